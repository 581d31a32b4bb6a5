"""Placement of activation Q/DQ pairs so that engines fuse them and pass integers between layers.

    x -> QuantizeLinear -> DequantizeLinear     q = clip(round(x / s), -128, 127),  s = amax / 127   (fp8: amax / 448)

Rounding is half to even. Pairs are placed

    before a layer's input        one for all readers of a tensor that share a scale, such as to_q, to_k and to_v
    after a layer's output        ONNX Runtime has no integer convolution with a float result: without these pairs the
                                  default teacher takes 170 ms per step instead of 75 (batch 8, one thread, AVX2)
    after a residual sum          readers with its scale need no pair of their own
    after a concatenation, a nearest-neighbour resize or a zero padding of tensors with one scale: it copies integers
    before a product of two rounded tensors, as q k^T of attention: with their own scales, so nothing is rounded again

and nowhere else. In particular there are none inside SiLU or between a norm and SiLU: engines fuse these with the
rounding that follows. With the pairs that NNCF places there, OpenVINO took 20 ms instead of 15.

Integers are stored as uint8 with zero point 128, q + 128: the same numbers, but on x86 ONNX Runtime has integer kernels
for no other type. It converts int8 with zero point 0 to uint8 only if a pair has one reader; with int8, 4 % of the
default teacher's products and 22 % of a DiT's ran in float. Version 1.32 also cannot load an opset 21 graph in which it
moves an int8 pair across a Reshape. TensorRT accepts only zero point 0.
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
from diffpress.export.passes.linear_to_conv1x1 import conv_input_of
from diffpress.export.passes.quantize_weights import numpy_type

UINT8_ZERO = 128
MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze")  # nodes that only move values


class IntegerScale(NamedTuple):
    """Scale of a tensor: its values are `factor` times those of `tensor`, which are multiples of `scale`."""

    tensor: str
    scale: np.ndarray
    factor: float = 1.0


@dataclass
class Placement:
    """Q/DQ pairs of a graph under construction; `tensorrt` writes them as TensorRT's parser expects.

    `scales` holds the float32 scale of every tensor that a pair outputs. `integer_scales` holds those of int8, and of
    tensors derived from them by moving values or by a constant factor.
    """

    rewrite: Rewrite
    tensorrt: bool
    scales: dict[str, np.ndarray] = field(default_factory=dict)
    integer_scales: dict[str, IntegerScale] = field(default_factory=dict)

    def round_input_(self, node: onnx.NodeProto, scale: np.ndarray, number: Number) -> None:
        """Make the layer's node read a quantized activation."""
        index = 1 - WEIGHT_INPUT[node.op_type]
        node.input[index] = self._rounded(node.input[index], node.name, scale, number)

    def round_entry_(self, node: onnx.NodeProto, scale: np.ndarray) -> None:
        """Make the first node of a layer written as a convolution read a quantized activation.

        The pair is placed before the transposition, which then moves a quarter of the bytes or none
        (export/passes/linear_to_conv1x1.py).
        """
        node.input[0] = self._rounded(node.input[0], node.name, scale, INT8)
        self.scales[conv_input_of(node)] = scale

    def round_output_(self, node: onnx.NodeProto, scale: np.ndarray, number: Number = INT8) -> None:
        """Insert a pair between the node and its output tensor, which keeps its name."""
        tensor = node.output[0]
        node.output[0] = f"{node.name}.output_float"
        self._add_pair(node.output[0], f"{node.name}.output", scale, number, tensor)

    def round_product_(self, node: onnx.NodeProto) -> None:
        """Make a product of two tensors with integer scales read integers; the pairs absorb their factors.

        ONNX Runtime then computes q k^T of a DiT on integers (attention takes 0.9x of the time), and so does
        OpenVINO in its fused attention kernel. The softmax output has no integer scale: rounding it to 1/255 disabled
        that kernel (1.2x to 1.4x of the time) and cost a DiT 3 dB. TensorRT fuses attention as well.
        """
        if node.op_type == "MatMul" and not self.tensorrt and all(name in self.integer_scales for name in node.input):
            node.input[:] = [self._dequantized(name) for name in node.input]

    def pass_on_(self, node: onnx.NodeProto) -> None:
        """Quantize a copy of tensors that share a scale: values do not change, and integers can be copied."""
        self._follow_(node)
        scales = [self.scales.get(name) for name in self._copied(node)]
        if scales and scales[0] is not None and all(_equal(scale, scales[0]) for scale in scales):
            self.round_output_(node, scales[0])

    def _copied(self, node: onnx.NodeProto) -> list[str]:
        """Return the inputs whose values the node copies, adding nothing but zeros; otherwise none."""
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
        """Record the integer scale of an output whose node moves values or multiplies them by a constant."""
        integer_scales = [(name, self.integer_scales[name]) for name in node.input if name in self.integer_scales]
        if len(integer_scales) != 1:
            return
        ((name, integer),) = integer_scales
        if node.op_type in MOVES and name == node.input[0] and integer.factor == 1.0:
            self.integer_scales[node.output[0]] = IntegerScale(node.output[0], integer.scale)
        elif node.op_type == "Mul" and (factor := self._factor(next(x for x in node.input if x != name))):
            self.integer_scales[node.output[0]] = IntegerScale(integer.tensor, integer.scale, integer.factor * factor)

    def _factor(self, name: str) -> float | None:
        """Return a stored positive scalar, or None for anything else."""
        stored = self.rewrite.initializers.get(name)
        if stored is None or name in self.rewrite.weights or list(stored.dims) not in ([], [1]):
            return None
        value = float(numpy_helper.to_array(stored).item())
        return value if value > 0 else None

    def _dequantized(self, tensor: str) -> str:
        """Return the tensor after a pair that changes no value; created once."""
        integer = self.integer_scales[tensor]
        if tensor in self.scales:
            return tensor
        key, done = (tensor, (integer.scale * np.float32(integer.factor)).tobytes()), self.rewrite.done
        if key not in done:
            done[key] = f"{tensor}.dequantized"
            self._add_pair(integer.tensor, tensor, integer.scale, INT8, done[key], integer.factor)
        return done[key]

    def _rounded(self, tensor: str, prefix: str, scale: np.ndarray, number: Number) -> str:
        """Return the tensor after a pair, shared by all readers with this scale; `tensor` if it already is one."""
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
        """Write `tensor`, rounded and multiplied by `factor`, to `out`."""
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
