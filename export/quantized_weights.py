"""Float weight + scales -> the integers that a file stores, and the DequantizeLinear that reads them.

A weight is quantized when it is written, with one float copy of it in memory at a time.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import helper

from export.graph import Weight, weight_of
from export.rewrite import Rewrite
from export.trace import WEIGHT_INPUT
from runtime.errors import BadInput

LEVELS = 127


def layer_of(node: onnx.NodeProto) -> str:
    """The torch layer whose weight this node applies, '' where it is none."""
    return node.name.partition("#")[0] if node.op_type in WEIGHT_INPUT else ""


def quantize_weight(rewrite: Rewrite, node: onnx.NodeProto, scale: np.ndarray) -> str:
    """The name of the node's weight after its DequantizeLinear."""
    name = node.input[WEIGHT_INPUT[node.op_type]]
    key = (name, scale.tobytes())
    if key not in rewrite.done:
        weight = weight_of(rewrite.source, name)
        axis, prefix = _channel_axis(node), f"{node.name}.weight"
        if scale.size != weight.shape[axis]:
            raise BadInput(
                f"layer '{layer_of(node)}': {scale.size} weight scales for {weight.shape[axis]} channels; was it "
                "pruned after it was quantized? quantize again"
            )
        divisor = scale.reshape([-1 if i == axis else 1 for i in range(len(weight.shape))])
        integers = Weight(np.dtype(np.int8), weight.shape, partial(_integers, weight, divisor))
        inputs = [
            rewrite.add_weight(f"{prefix}_int8", integers),
            rewrite.add(f"{prefix}_scale", scale),
            rewrite.add(f"{prefix}_zero", np.zeros(scale.size, np.int8)),
        ]
        out = f"{prefix}_dequantized"
        rewrite.nodes.append(helper.make_node("DequantizeLinear", inputs, [out], f"{prefix}/DQ", axis=axis))
        rewrite.done[key] = out
    return rewrite.done[key]


def _integers(weight: Weight, scale: np.ndarray) -> np.ndarray:
    """clip(round(w / s), -127, 127) as int8, with one float copy of the weight at a time."""
    levels = weight.read() / scale
    np.rint(levels, out=levels)
    return np.clip(levels, -LEVELS, LEVELS, out=levels).astype(np.int8)


def _channel_axis(node: onnx.NodeProto) -> int:
    """Where a weight keeps its output channels (an embedding: its rows)."""
    if node.op_type == "Gemm":
        return 0 if any(entry.name == "transB" and entry.i for entry in node.attribute) else 1
    return 1 if node.op_type in ("MatMul", "ConvTranspose") else 0
