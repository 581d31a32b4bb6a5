"""bfloat16 graph -> the same graph and rounded weights in float32, so that engines can check it.

ONNX Runtime has no bfloat16 kernels on the CPU. OpenVINO has them and runs float graphs correctly, but not Q/DQ graphs
on processors with AVX512-BF16 (2026.4.1: one evaluation of a U-Net has an SQNR of -0.5 dB, and of 24.6 dB if the same
graph is computed in float32). Quantized bfloat16 graphs are therefore checked in float32. The additional rounding of
activations costs as much as bfloat16 costs a float graph.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from diffpress.export.graph.model import Graph, Weight, weight_of
from diffpress.export.graph.rewrite import Rewrite, copies


def bf16_to_fp32(graph: Graph) -> Graph:
    """Return a copy of `graph` with every bfloat16 tensor cast to float32. Reads no weight yet."""
    rewrite = Rewrite(graph)
    for tensor in graph.proto.graph.initializer:
        if tensor.data_type != TensorProto.BFLOAT16:
            continue
        weight = weight_of(graph, tensor.name)
        if tensor.name in graph.weights:
            rewrite.add_weight(tensor.name, Weight(np.dtype(np.float32), weight.shape, partial(_wide, weight)))
        else:
            rewrite.add(tensor.name, _wide(weight))
    for node in copies(graph.proto.graph.node):
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.BFLOAT16:
                value = numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(numpy_helper.from_array(value))
            elif node.op_type == "Cast" and attribute.name == "to" and attribute.i == TensorProto.BFLOAT16:
                attribute.i = TensorProto.FLOAT
        rewrite.nodes.append(node)
    return rewrite.graph()


def _wide(weight: Weight) -> np.ndarray:
    return weight.read().astype(np.float32)
