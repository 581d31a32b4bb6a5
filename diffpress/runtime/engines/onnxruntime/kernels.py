"""Kernels of ONNX Runtime in a profile: their kinds, their MACs from their shapes, and what they are named after.

Graph optimizations append suffixes to the names of replaced nodes ('conv_token_31', 'proj/MatMulAddFusion'), and name a
blocked convolution after the tensor that it writes ('conv2d_nchwc').
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from diffpress.runtime.engines import executed_layers as layers
from diffpress.runtime.engines import macs

CONVOLUTIONS = {"Conv", "FusedConv", "NhwcFusedConv", "NhwcConv", "QLinearConv", "ConvInteger"}
TRANSPOSED = {"ConvTranspose"}
PRODUCTS = {
    "MatMul",
    "Gemm",
    "FusedMatMul",
    "FusedGemm",
    "MatMulNBits",
    "QGemm",
    "QLinearMatMul",
    "MatMulInteger",
}
PRODUCTS |= {"MatMulIntegerToFloat", "DynamicQuantizeMatMul"}
ATTENTIONS = {"Attention", "MultiHeadAttention"}
INTEGER = {"QLinearConv", "ConvInteger", "QGemm", "QLinearMatMul", "MatMulInteger", "MatMulIntegerToFloat"}
INTEGER |= {"DynamicQuantizeMatMul"}

OPERATIONS = {
    **dict.fromkeys(CONVOLUTIONS | TRANSPOSED, layers.CONVOLUTION),
    **dict.fromkeys(PRODUCTS, layers.LINEAR),
    **dict.fromkeys({*ATTENTIONS, "Softmax", "QLinearSoftmax"}, layers.ATTENTION),
    **dict.fromkeys(
        (
            *(
                "InstanceNormalization",
                "LayerNormalization",
                "GroupNorm",
                "SkipLayerNormalization",
                "BatchNormalization",
            ),
            *("SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "SkipGroupNorm", "RMSNormalization"),
        ),
        layers.NORMALIZATION,
    ),
    **dict.fromkeys(
        (
            *("ReorderInput", "ReorderOutput", "QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast"),
            *("Transpose", "Reshape", "MemcpyToHost", "MemcpyFromHost"),
        ),
        layers.CONVERSION,
    ),
    **dict.fromkeys(
        (
            *("Add", "Sub", "Mul", "Div", "Pow", "Sqrt", "Exp", "Neg", "Sin", "Cos", "Erf", "Tanh", "Sigmoid", "Relu"),
            *("LeakyRelu", "Clip", "Gelu", "FastGelu", "BiasGelu", "QuickGelu", "BiasSplitGelu", "HardSigmoid"),
            *("QLinearAdd", "QLinearMul", "QLinearSigmoid", "QLinearLeakyRelu", "Where", "Softplus", "Mish", "Silu"),
        ),
        layers.ELEMENTWISE,
    ),
}

KERNEL = "_kernel_time"
BLOCKED = "_nchwc"
REWRITTEN = re.compile(r"(_token_\d+|/\w+Fusion/?)+$")

TYPE_BYTES = {"float16": 2, "bfloat16": 2, "int8": 1, "uint8": 1}  # others have 4 here: only matrices are looked up

Event = dict[str, Any]


def kernel_name(name: str) -> str:
    """Return the node or tensor that an event of a kernel is named after, without what graph optimizations appended."""
    return REWRITTEN.sub("", name.removesuffix(KERNEL)).removesuffix(BLOCKED)


def kernel_macs(node: Event) -> int:
    """Return the MACs of one executed kernel; 0 if it is no convolution, product or attention.

    `node` are a profile's `args`, of a session without prepacked weights.
    """
    kind = node["op_name"]
    shapes = [shape for _, shape in _tensors(node["input_type_shape"])]
    out: list[int] = next((shape for _, shape in _tensors(node["output_type_shape"])), [])
    tensors = [shape for shape in shapes if len(shape) > 1]  # excludes scales, zero points and biases
    if kind in CONVOLUTIONS:
        return macs.convolution(out, tensors[1])
    if kind in TRANSPOSED:
        return macs.transposed_convolution(tensors[0], tensors[1])
    if kind in PRODUCTS:
        return macs.product(tensors[0], out)
    if kind in ATTENTIONS:
        return macs.attention(*tensors[:3])
    return 0


def kernel_operation(node: Event) -> str:
    """Return one of executed_layers.OPERATIONS; a product of two activations is part of an attention."""
    kind = node["op_name"]
    found = OPERATIONS.get(kind, layers.OTHER)
    return layers.ATTENTION if found == layers.LINEAR and _multiplies_activations(node) else found


def kernel_precision(node: Event) -> str:
    """Return what a kernel computes in: the type of its first input, int8 for products of integers."""
    if node["op_name"] in INTEGER:
        return layers.INT8
    types = [kind for kind, _ in _tensors(node["input_type_shape"])]
    return next((layers.PRECISIONS.get(kind, kind) for kind in types), "")


def kernel_bytes(node: Event) -> int:
    """Return the bytes that a kernel reads, weights included, and writes."""
    return sum(int(node.get(key, 0)) for key in ("activation_size", "parameter_size", "output_size"))


def _tensors(listed: list[dict[str, list[int]]]) -> Iterator[tuple[str, list[int]]]:
    return ((kind, shape) for entry in listed for kind, shape in entry.items())


def _multiplies_activations(node: Event) -> bool:
    """Return whether both matrices are activations: they have more than two dimensions, and all their bytes are."""
    matrices = [(kind, shape) for kind, shape in _tensors(node["input_type_shape"]) if len(shape) > 1]
    size = sum(math.prod(shape) * TYPE_BYTES.get(kind, 4) for kind, shape in matrices)
    is_batched = len(matrices) > 1 and all(len(shape) > 2 for _, shape in matrices)
    return is_batched and int(node.get("activation_size", 0)) >= size
