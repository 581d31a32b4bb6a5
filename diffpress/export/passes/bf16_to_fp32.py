"""A graph in bfloat16 -> the same graph, the same rounded weights, computed in float32: for engines to check it in.

ONNX Runtime has no bfloat16 kernels on the CPU. OpenVINO has, and runs them right in a float graph; between Q/DQ it
does not on processors with AVX512-BF16 (2026.4.1: one call of a U-Net comes out with an SQNR of -0.5 dB, 24.6 where the
same graph is computed in float32). So what a quantized bfloat16 graph says is checked this way; that activations are
rounded as well costs what bfloat16 costs a float graph.
"""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from diffpress.export.graph.model import Graph, Weight, weight_of
from diffpress.export.graph.rewrite import Rewrite, copies


def widened(graph: Graph) -> Graph:
    """`graph`, itself left as it is, with every bfloat16 in it a float32 of the same value. Reads no weight yet."""
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
