"""nvfp4 activations for TensorRT: 4-bit floats whose block scales are computed at run time.

    x -> TRT_FP4DynamicQuantize -> x4 [E2M1], s8 [E4M3, one per 16]      s8 -> DequantizeLinear by top -> s
    x4 -> DequantizeLinear by s, in blocks of 16 along the last axis         top = amax / (6 * 448)

The operator belongs to TensorRT's own domain; ONNX has none, so graphs for the CPU keep these activations in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from diffpress.compress.quantization.formats import FORMATS, FP8
from diffpress.export.graph.rewrite import Rewrite
from diffpress.export.graph.trace import WEIGHT_INPUT

DOMAIN = "trt"
BLOCK = FORMATS["nvfp4"].block


def quantize_dynamically_(rewrite: Rewrite, node: onnx.NodeProto, scale: np.ndarray) -> None:
    """Make the layer's node read its activation in nvfp4; `scale` is amax / 6, the largest 4-bit float."""
    index = 1 - WEIGHT_INPUT[node.op_type]
    tensor, prefix = node.input[index], f"{node.name}.input"
    key = (tensor, scale.tobytes())
    if key not in rewrite.done:
        top = rewrite.add(f"{prefix}_scale", (scale / np.float32(FP8.largest)).reshape(()))
        x4, s8, s, out = (f"{prefix}_{what}" for what in ("quantized", "block_scales", "scales", "dequantized"))
        along: dict[str, Any] = {"axis": -1, "block_size": BLOCK}
        quantize = helper.make_node(
            "TRT_FP4DynamicQuantize",
            [tensor, top],
            [x4, s8],
            f"{prefix}/Q",
            domain=DOMAIN,
            scale_type=TensorProto.FLOAT8E4M3FN,
            **along,
        )
        rewrite.nodes += [
            quantize,
            helper.make_node("DequantizeLinear", [s8, top], [s], f"{s}/DQ"),
            helper.make_node("DequantizeLinear", [x4, s], [out], f"{prefix}/DQ", **along),
        ]
        rewrite.done[key] = out
    node.input[index] = rewrite.done[key]
