"""SmoothQuant: a float graph computes the same function with smoother activations.

    y = w x   becomes   y = (w diag(s)) (x * (1 / s))       s [in], positive

    source: compress/quantization/algorithms/smoothquant.py

The factor 1 / s is a Mul before the layer, shared by all readers of a tensor with the same s. Weights are multiplied
when they are read.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import numpy as np
import onnx
import torch
from onnx import helper

from diffpress.export.graph.model import Graph, Weight, weight_of
from diffpress.export.graph.rewrite import Rewrite, copies
from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.export.passes.quantize_weights import channel_axis, layer_of
from diffpress.runtime.errors import InvalidInputError

LAST = ("Gemm", "MatMul")  # operators whose input has its channels on the last axis
SMOOTHED = ".weight_smoothed"  # suffix of the weights of smoothed layers


def apply_smoothquant(graph: Graph, smooth: Mapping[str, torch.Tensor]) -> Graph:
    """Return a copy of `graph` with the layers of `smooth` (name -> factors [in]) smoothed.

    Raises:
        InvalidInputError: If factors are not positive and finite or do not match the layer's weight, or if the graph
            has no such layer; the message names the layer.
    """
    if not smooth:
        return graph
    rewrite = Rewrite(graph)
    missing = set(smooth)
    for node in copies(graph.proto.graph.node):
        layer = layer_of(node)
        if layer in smooth:
            missing.discard(layer)
            _smooth_(rewrite, node, smooth[layer].detach().cpu().numpy().astype(np.float32))
        rewrite.nodes.append(node)
    if missing:
        name = min(missing)
        raise InvalidInputError(
            f"layer '{name}': the graph has no node that applies its weight; was it exported from another model?"
        )
    return rewrite.graph()


def _smooth_(rewrite: Rewrite, node: onnx.NodeProto, s: np.ndarray) -> None:
    index, layer = WEIGHT_INPUT[node.op_type], layer_of(node)
    name, tensor = node.input[index], node.input[1 - index]
    weight, axis = weight_of(rewrite.source, name), 1 - channel_axis(node)
    if s.size != weight.shape[axis] or not (np.isfinite(s).all() and (s > 0).all()):
        raise InvalidInputError(
            f"layer '{layer}': its smoothing factors must be {weight.shape[axis]} positive numbers, one per input "
            "channel; quantize again"
        )
    wide = s.reshape([-1 if i == axis else 1 for i in range(len(weight.shape))])
    node.input[index] = rewrite.add_weight(
        f"{layer}{SMOOTHED}", Weight(np.dtype(np.float32), weight.shape, partial(_multiplied, weight, wide))
    )
    key = (tensor, s.tobytes())
    if key not in rewrite.done:
        last = node.op_type in LAST
        factor = (1 / s).reshape(-1) if last else (1 / s).reshape(-1, *[1] * (len(weight.shape) - 2))
        inputs = [tensor, rewrite.add(f"{node.name}.input_factor", factor)]
        rewrite.done[key] = f"{node.name}.input_smoothed"
        rewrite.nodes.append(helper.make_node("Mul", inputs, [rewrite.done[key]], f"{node.name}.input/Mul"))
    node.input[1 - index] = rewrite.done[key]


def _multiplied(weight: Weight, factor: np.ndarray) -> np.ndarray:
    product: np.ndarray = weight.read() * factor
    return product
