"""Quantize weights as stored in a file, and add the nodes that dequantize them, by format.

    int8, fp8            int8 or float8        -> DequantizeLinear, a scale per output channel
    w4a8                 int4 -> Cast to int8  -> DequantizeLinear
    int4                 int4                  -> DequantizeLinear in blocks of inputs
    int4, convolutions   int4 -> Cast to float -> Mul -> Reshape     (TensorRT: -> DequantizeLinear -> Reshape)
    nvfp4                4-bit codes -> Gather -> Mul -> Reshape     (TensorRT: float4 -> DequantizeLinear)

with q = round(w / scale), clipped to the format's largest number. Two 4-bit integers share a byte. ONNX Runtime 1.32
and OpenVINO 2026.4 fold the Casts when they load a graph: w4a8 then runs int8 kernels, which it does not with a
DequantizeLinear from int4 (measured in both), and convolutions run float kernels. A DequantizeLinear would be
recomputed at every step (1.3x the time of the default teacher in ONNX Runtime). For matrix products ONNX Runtime has a
kernel that reads blocks of int4 and keeps its memory small (1.02x the time of float).

TensorRT accepts quantized numbers only from an initializer, so there the 4-bit integers of w4a8 are stored as int8.

Weights are quantized when they are written, with one float copy of a weight in memory at a time.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from diffpress.compress.quantization.formats import FP4, FP8, INT4, INT8, Format, Number, scale_shape
from diffpress.compress.quantization.nvfp4 import LEAST_SCALE
from diffpress.export.graph.model import Weight, weight_of
from diffpress.export.graph.rewrite import Rewrite
from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.runtime.errors import InvalidInputError

CONVOLUTIONS = ("Conv", "ConvTranspose")


class _Job(NamedTuple):
    """Weight to be stored: its output channels are on axis `axis`; `scale` is [out] or [out, blocks]."""

    rewrite: Rewrite
    prefix: str
    weight: Weight
    axis: int
    scale: np.ndarray
    form: Format

    @property
    def blocked(self) -> bool:
        """Whether there is a scale per block of inputs."""
        return self.scale.ndim == 2

    @property
    def block(self) -> int:
        """Number of weights per scale."""
        return prod(self.weight.shape) // self.scale.size

    @property
    def layout(self) -> tuple[int, ...]:
        """The weight's shape; with blocks, [out, blocks, block] or [blocks, block, out]."""
        if not self.blocked:
            return self.weight.shape
        out, blocks = self.scale.shape
        return (blocks, self.block, out) if self.axis else (out, blocks, self.block)

    @property
    def divisor(self) -> np.ndarray:
        """The scales in a shape that broadcasts with the layout."""
        if self.blocked:
            return self.scale.T[:, None] if self.axis else self.scale[..., None]
        return self.scale.reshape([-1 if i == self.axis else 1 for i in range(len(self.weight.shape))])


def numpy_type(number: Number) -> np.dtype:
    """Return the numpy dtype (of ml_dtypes, if numpy has none) of a number format."""
    return np.dtype(getattr(ml_dtypes, number.name, number.name))


def layer_of(node: onnx.NodeProto) -> str:
    """Return the torch layer whose weight this node applies, or '' if it applies none."""
    return node.name.partition("#")[0] if node.op_type in WEIGHT_INPUT else ""


def quantize_weight(
    rewrite: Rewrite, node: onnx.NodeProto, scale: np.ndarray, form: Format, tensorrt: bool = False
) -> str:
    """Quantize the weight of `node`; return the name of the dequantized tensor.

    `scale` has the shape `formats.scale_shape`, output channels first.
    """
    name = node.input[WEIGHT_INPUT[node.op_type]]
    key = (name, scale.tobytes())
    if key not in rewrite.done:
        weight, axis = weight_of(rewrite.source, name), channel_axis(node)
        _check_fit(node, scale, weight.shape, axis, form)
        job = _Job(rewrite, f"{node.name}.weight", weight, axis, scale, form)
        rewrite.done[key] = _stored(job, node.op_type in CONVOLUTIONS, tensorrt)
    return rewrite.done[key]


def _check_fit(node: onnx.NodeProto, scale: np.ndarray, shape: tuple[int, ...], axis: int, form: Format) -> None:
    channels = shape[axis]
    # blocks of inputs are not contiguous in a transposed convolution's weight
    needed = (channels,) if node.op_type == "ConvTranspose" else scale_shape(form, (channels, prod(shape) // channels))
    if scale.shape != needed:
        raise InvalidInputError(
            f"layer '{layer_of(node)}': {scale.size} weight scales for {' x '.join(map(str, needed))} "
            f"{'blocks' if len(needed) > 1 else 'channels'}; was it pruned after it was quantized? quantize again"
        )


def _stored(job: _Job, convolution: bool, tensorrt: bool) -> str:
    number, shape = job.form.weights, job.weight.shape
    if number is INT4 and job.form.activations is not None:
        if tensorrt:
            return _dequantized(job, _numbers(job, INT8, shape), INT8)
        return _dequantized(job, _node(job, "Cast", [_numbers(job, INT4, shape)], "int8", to=TensorProto.INT8), INT8)
    if number is INT4 and convolution and not tensorrt:
        levels = _node(job, "Cast", [_numbers(job, INT4, job.layout)], "levels", to=TensorProto.FLOAT)
        return _reshaped(job, _node(job, "Mul", [levels, _constant(job, "scale", job.divisor)], "blocks"))
    if number is FP4:
        return _stored_fp4(job, tensorrt)
    if convolution and job.blocked:
        rows = (shape[0], prod(shape[1:]))
        return _reshaped(job, _dequantized(job, _numbers(job, number, rows), number, "blocks"))
    return _dequantized(job, _numbers(job, number, shape), number)


def _stored_fp4(job: _Job, tensorrt: bool) -> str:
    """Store nvfp4 with its two scales (compress/quantization/nvfp4.py); the CPU gets codes and a table."""
    largest = np.float32(FP8.largest)
    top = job.scale.max() / largest
    block_scales = np.clip(job.scale / top, np.float32(LEAST_SCALE), largest).astype(numpy_type(FP8))
    job = job._replace(scale=block_scales.astype(np.float32) * top)
    inputs = [_constant(job, "shares", block_scales.T if job.axis else block_scales), _constant(job, "top", top)]
    if tensorrt:
        scales, numbers = _node(job, "DequantizeLinear", inputs, "scales"), _numbers(job, FP4, job.weight.shape)
        axis = 1 - job.axis
        return _node(job, "DequantizeLinear", [numbers, scales], "dequantized", axis=axis, block_size=job.block)
    inputs[0] = _constant(job, "shares", block_scales.T[:, None] if job.axis else block_scales[..., None])
    scales = _node(job, "Mul", [_node(job, "Cast", inputs[:1], "widened", to=TensorProto.FLOAT), inputs[1]], "scales")
    table = job.rewrite.add("float4_values", np.arange(16, dtype=np.uint8).view(numpy_type(FP4)).astype(np.float32))
    numbers = _numbers(job, FP4, job.layout, np.dtype(ml_dtypes.uint4))
    codes = _node(job, "Cast", [numbers], "codes", to=TensorProto.INT32)
    return _reshaped(job, _node(job, "Mul", [_node(job, "Gather", [table, codes], "levels"), scales], "blocks"))


def _dequantized(job: _Job, numbers: str, number: Number, what: str = "dequantized") -> str:
    if job.blocked:
        inputs = [numbers, _constant(job, "scale", job.scale.T if job.axis else job.scale)]
        return _node(job, "DequantizeLinear", inputs, what, axis=1 - job.axis, block_size=job.block)
    inputs = [numbers, _constant(job, "scale", job.scale)]
    inputs.append(_constant(job, "zero", np.zeros(job.scale.size, numpy_type(number))))
    return _node(job, "DequantizeLinear", inputs, what, axis=job.axis)


def _reshaped(job: _Job, rows: str) -> str:
    return _node(job, "Reshape", [rows, _constant(job, "shape", np.asarray(job.weight.shape, np.int64))], "dequantized")


def _numbers(job: _Job, number: Number, shape: tuple[int, ...], coded: np.dtype | None = None) -> str:
    """Store the quantized numbers in the type of `number` and in `shape`; return their name.

    With `coded`, integers of that type are stored that have the bits of these numbers.
    """
    dtype = coded or numpy_type(number)
    read = partial(_rounded, job.weight, job.layout, job.divisor, job.form.weights, numpy_type(number), coded, shape)
    return job.rewrite.add_weight(f"{job.prefix}_{dtype.name}", Weight(dtype, shape, read))


def _rounded(
    weight: Weight,
    layout: tuple[int, ...],
    divisor: np.ndarray,
    number: Number,
    dtype: np.dtype,
    coded: np.dtype | None,
    shape: tuple[int, ...],
) -> np.ndarray:
    """Return clip(round(w / s)) in `dtype`, with one float copy of the weight at a time."""
    levels = weight.read().reshape(layout) / divisor
    if number.is_integer:
        np.rint(levels, out=levels)
    found = np.clip(levels, -number.largest, number.largest, out=levels).astype(dtype).reshape(shape)
    return found if coded is None else found.view(np.uint8).astype(coded)


def _constant(job: _Job, what: str, value: np.ndarray) -> str:
    return job.rewrite.add(f"{job.prefix}_{what}", value)


def _node(job: _Job, operator: str, inputs: list[str], what: str, **attributes: Any) -> str:
    out = f"{job.prefix}_{what}"
    job.rewrite.nodes.append(helper.make_node(operator, inputs, [out], f"{out}/{operator}", **attributes))
    return out


def channel_axis(node: onnx.NodeProto) -> int:
    """Return the axis of a weight's output channels (of an embedding: its rows)."""
    if node.op_type == "Gemm":
        return 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1
    return 1 if node.op_type in ("MatMul", "ConvTranspose") else 0
