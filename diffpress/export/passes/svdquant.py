"""SVDQuant: move part of each weight of a float graph into a low-rank branch that is not quantized.

    y = w x   becomes   y = (w - up down) x + up (down x)       compress/quantization/algorithms/svdquant.py

The branch is two MatMuls beside the layer and an Add after it. The branch's product is subtracted from a weight when
the weight is read.
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


def svdquant(graph: Graph, svdquant: Mapping[str, torch.Tensor]) -> Graph:
    """Return a copy of `graph` with the branches '<layer>.down' [rank, in] and '<layer>.up' [out, rank].

    Raises:
        InvalidInputError: If factors do not match the layer's weight, or if the graph has no such layer; the message
            names the layer.
    """
    missing = {key.rpartition(".")[0] for key in svdquant}
    if not missing:
        return graph
    rewrite = Rewrite(graph)
    for node in copies(graph.proto.graph.node):
        layer = layer_of(node)
        rewrite.nodes.append(node)
        if f"{layer}.up" in svdquant:
            missing.discard(layer)
            factors = (svdquant[f"{layer}.{side}"].detach().cpu().numpy().astype(np.float32) for side in ("down", "up"))
            _branch_(rewrite, node, *factors)
    if missing:
        raise InvalidInputError(
            f"layer '{min(missing)}': the graph has no node that applies its weight; "
            "was it exported from another model?"
        )
    return rewrite.graph()


def _branch_(rewrite: Rewrite, node: onnx.NodeProto, down: np.ndarray, up: np.ndarray) -> None:
    index, layer = WEIGHT_INPUT[node.op_type], layer_of(node)
    name, tensor = node.input[index], node.input[1 - index]
    weight, axis = weight_of(rewrite.source, name), channel_axis(node)
    if len(weight.shape) != 2 or (up.shape[0], down.shape[1]) != (weight.shape[axis], weight.shape[1 - axis]):
        raise InvalidInputError(f"layer '{layer}': branch does not match weight {weight.shape}; quantize again")
    residual = Weight(np.dtype(np.float32), weight.shape, partial(_residual, weight, axis, down, up))
    node.input[index] = rewrite.add_weight(f"{layer}.weight_left", residual)
    out, rounded, narrow, wide = node.output[0], *(f"{node.name}.{suffix}" for suffix in ("rounded", "narrow", "wide"))
    node.output[0] = rounded
    inputs = [rewrite.add(f"{layer}.branch_{side}", value.T.copy()) for side, value in (("down", down), ("up", up))]
    rewrite.nodes += [
        helper.make_node("MatMul", [tensor, inputs[0]], [narrow], f"{layer}.svdquant_down#{len(rewrite.nodes)}"),
        helper.make_node("MatMul", [narrow, inputs[1]], [wide], f"{layer}.svdquant_up#{len(rewrite.nodes)}"),
        helper.make_node("Add", [rounded, wide], [out], f"{layer}.branch/Add#{len(rewrite.nodes)}"),
    ]


def _residual(weight: Weight, axis: int, down: np.ndarray, up: np.ndarray) -> np.ndarray:
    product = up @ down
    residual: np.ndarray = weight.read().astype(np.float32) - (product if axis == 0 else product.T)
    return residual
