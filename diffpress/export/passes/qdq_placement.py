"""Where activations are rounded: Q/DQ pairs, placed so that engines fuse them and integers flow.

    x -> QuantizeLinear -> DequantizeLinear     q = clip(round(x / s), -128, 127),  s = amax / 127   (fp8: amax / 448)

Rounding is half to even. The pairs stand

    before a layer's input        one serves all readers of a tensor that share a scale, such as to_q, to_k and to_v
    behind a layer's output       ONNX Runtime has no integer convolution with a float result: without these pairs the
                                  default teacher takes 170 ms a step instead of 75 (batch 8, one thread, AVX2)
    behind a residual sum         and what reads it at its scale needs no pair of its own
    behind a concatenation, a nearest resizing or a padding with zeros of tensors of one scale: it copies integers
    before a product of two rounded tensors, as q k^T of attention: on their own integer_scales, so that nothing is rounded anew

and nowhere else; above all not inside of SiLU, nor between a norm and it: engines fuse those with the rounding that
follows, and OpenVINO took 20 ms instead of 15 for them where NNCF had put pairs in between.

Integers are stored as uint8 with zero point 128, q + 128: the same numbers, but ONNX Runtime has integer kernels of
x86 for no other type. It turns int8 with zero point 0 into that by itself where a pair has one reader, and nowhere
else: 4 % of the default teacher's products and 22 % of a DiT's then ran in float; and version 1.32 cannot load a graph
of opset 21 in which it moves an int8 pair over a Reshape. TensorRT takes zero point 0 alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import onnx
from onnx import helper, numpy_helper

from diffpress.compress.quantization.formats import INT8, Number
from diffpress.export.graph.rewrite import Rewrite
from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.export.passes.linear_to_conv1x1 import channels_of
from diffpress.export.passes.quantize_weights import numpy_type

UINT8_ZERO = 128
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")  # nodes that only move values


class IntegerScale(NamedTuple):
    """Where values lie: `factor` times those of `tensor`, which are whole multiples of `scale`."""

    tensor: str
    scale: np.ndarray
    factor: float = 1.0


@dataclass
class Placement:
    """The pairs in a graph that is being written; `tensorrt` as its parser wants them.

    `scales` has the float32 scale of every tensor that comes out of a pair, `integer_scales` tells of those of int8, and of what
    was made from them by moving values and by a constant factor.
    """

    rewrite: Rewrite
    tensorrt: bool
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    integer_scales: dict[str, IntegerScale] = field(default_factory=dict)

    def round_input_(self, node: onnx.NodeProto, scale: np.ndarray, number: Number) -> None:
        """Let the layer's node read its activation rounded."""
        index = 1 - WEIGHT_INPUT[node.op_type]
        node.input[index] = self._rounded(node.input[index], node.name, scale, number)

    def round_entry_(self, node: onnx.NodeProto, scale: np.ndarray) -> None:
        """Let the node that begins a layer written as a convolution (export/passes/linear_to_conv1x1.py) read its activation rounded:
        in front of the transposition, which then moves a quarter of the bytes or none.
        """
        node.input[0] = self._rounded(node.input[0], node.name, scale, INT8)
        self.scales[channels_of(node)] = scale

    def round_output_(self, node: onnx.NodeProto, scale: np.ndarray, number: Number = INT8) -> None:
        """Put a pair between the node and the tensor it wrote, whose name its readers keep."""
        tensor = node.output[0]
        node.output[0] = f"{node.name}.output_float"
        self._add_pair(node.output[0], f"{node.name}.output", scale, number, tensor)

    def round_product_(self, node: onnx.NodeProto) -> None:
        """Let a product of two tensors that lie on integer_scales read integers; the pairs take over their factors.

        So ONNX Runtime computes q k^T of a DiT on integers (attention in 0.9x of the time), and OpenVINO goes on with
        its float kernel for attention as a whole. What softmax gives lies on no grid: rounded to 1/255 it broke that
        kernel (1.2 to 1.4x), and cost a DiT 3 dB. TensorRT too fuses attention as a whole.
        """
        if node.op_type == "MatMul" and not self.tensorrt and all(name in self.integer_scales for name in node.input):
            node.input[:] = [self._on_grid(name) for name in node.input]

    def pass_on_(self, node: onnx.NodeProto) -> None:
        """Round what the node only copies from tensors of one scale: nothing changes, and it can copy integers."""
        self._follow_(node)
        scales = [self.scales.get(name) for name in self._copied(node)]
        if scales and scales[0] is not None and all(_equal(scale, scales[0]) for scale in scales):
            self.round_output_(node, scales[0])

    def _copied(self, node: onnx.NodeProto) -> list[str]:
        """The inputs of which the node copies values, and adds nothing but zeros; none where it does more."""
        settings = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
        if node.op_type == "Concat":
            return list(node.input)
        if node.op_type == "Resize" and settings.get("mode", b"nearest") == b"nearest":
            return [node.input[0]]
        if node.op_type == "Pad" and settings.get("mode", b"constant") == b"constant":
            value = self.rewrite.initializers.get(node.input[2]) if len(node.input) > 2 and node.input[2] else None
            zero = len(node.input) < 3 or not node.input[2] or (value is not None and not numpy_helper.to_array(value))
            return [node.input[0]] if zero else []
        return []

    def _follow_(self, node: onnx.NodeProto) -> None:
        """Note on which grid the node's output lies, where it only moves values, or scales them by a constant."""
        integer_scales = [(name, self.integer_scales[name]) for name in node.input if name in self.integer_scales]
        if len(integer_scales) != 1:
            return
        ((name, integer),) = integer_scales
        if node.op_type in MOVES and name == node.input[0] and integer.factor == 1.0:
            self.integer_scales[node.output[0]] = IntegerScale(node.output[0], integer.scale)
        elif node.op_type == "Mul" and (factor := self._factor(next(x for x in node.input if x != name))):
            self.integer_scales[node.output[0]] = IntegerScale(integer.tensor, integer.scale, integer.factor * factor)

    def _factor(self, name: str) -> float | None:
        """A stored positive number, None for anything else."""
        stored = self.rewrite.initializers.get(name)
        if stored is None or name in self.rewrite.weights or list(stored.dims) not in ([], [1]):
            return None
        value = float(numpy_helper.to_array(stored).item())
        return value if value > 0 else None

    def _on_grid(self, tensor: str) -> str:
        """The tensor behind a pair that changes no value, made once."""
        integer = self.integer_scales[tensor]
        if tensor in self.scales:
            return tensor
        key, done = (tensor, (integer.scale * np.float32(integer.factor)).tobytes()), self.rewrite.done
        if key not in done:
            done[key] = f"{tensor}.dequantized"
            self._add_pair(integer.tensor, tensor, integer.scale, INT8, done[key], integer.factor)
        return done[key]

    def _rounded(self, tensor: str, prefix: str, scale: np.ndarray, number: Number) -> str:
        """The tensor behind a pair, made once for all readers at this scale; itself where it comes out of one."""
        if _equal(self.scales.get(tensor), scale):
            return tensor
        key, done = (tensor, scale.tobytes()), self.rewrite.done
        if key not in done:
            done[key] = f"{prefix}.input_dequantized"
            self._add_pair(tensor, f"{prefix}.input", scale, number, done[key])
        return done[key]

    def _add_pair(
        self, tensor: str, prefix: str, scale: np.ndarray, number: Number, out: str, factor: float = 1.0
    ) -> None:
        """Write `tensor`, rounded and times `factor`, to `out`."""
        parameters = [self.rewrite.add(f"{prefix}_scale", scale.reshape(())), self._zero(number)]
        numbers, wider = f"{prefix}_quantized", scale * np.float32(factor)
        self.rewrite.nodes.append(helper.make_node("QuantizeLinear", [tensor, *parameters], [numbers], f"{prefix}/Q"))
        if factor != 1.0:
            parameters[0] = self.rewrite.add(f"{prefix}_scale_after", wider.reshape(()))
        self.rewrite.nodes.append(helper.make_node("DequantizeLinear", [numbers, *parameters], [out], f"{prefix}/DQ"))
        self.scales[out] = wider
        if number is INT8:
            self.integer_scales[out] = IntegerScale(out, wider)

    def _zero(self, number: Number) -> str:
        if number is INT8 and not self.tensorrt:
            return self.rewrite.add("uint8_zero", np.asarray(UINT8_ZERO, np.uint8))
        return self.rewrite.add(f"{number.name}_zero", np.zeros((), numpy_type(number)))


def _equal(a: np.ndarray | None, b: np.ndarray | None) -> bool:
    return a is not None and b is not None and a.tobytes() == b.tobytes()
