"""Verify that layers made 2:4 sparse still are in the weights that a graph stores."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import numpy as np
import onnx

from diffpress.export.graph.model import Graph, weight_of
from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.export.passes.quantize_weights import channel_axis, layer_of
from diffpress.runtime.errors import InvalidInputError

GROUP, NONZERO = 4, 2


def check_sparsity(graph: Graph, layers: Iterable[str], what: str) -> tuple[str, ...]:
    """Return those of `layers` of which the graph stores at most two numbers of four that are not zero.

    Layers of which the graph stores no weight (folded into tables) or codes (nvfp4) are left out.

    Raises:
        InvalidInputError: A layer has lost the pattern.
    """
    wanted, found = set(layers), set[str]()
    producers = {name: node for node in graph.proto.graph.node for name in node.output}
    for node in graph.proto.graph.node:
        layer = layer_of(node)
        if layer not in wanted:
            continue
        stored = _stored(graph, node.input[WEIGHT_INPUT[node.op_type]], producers)
        if stored is None:
            continue
        if not _is_sparse(stored, channel_axis(node)):
            raise InvalidInputError(f"{what}: layer '{layer}' is no longer 2:4 sparse; please report this")
        found.add(layer)
    return tuple(sorted(found))


def _stored(graph: Graph, name: str, producers: Mapping[str, onnx.NodeProto]) -> np.ndarray | None:
    """Return the numbers from which nodes dequantize the weight `name`; None if it is computed or looked up."""
    shape = None
    while name in producers:
        node = producers[name]
        if not node.input or node.op_type == "Gather":  # nvfp4 stores codes of a table
            return None
        if node.op_type == "Reshape":  # of blocks to the weight's shape
            shape = weight_of(graph, node.input[1]).read()
        name = node.input[0]
    try:
        numbers = weight_of(graph, name).read()
    except KeyError:
        return None
    return numbers if shape is None else numbers.reshape(shape)


def _is_sparse(weight: np.ndarray, axis: int) -> bool:
    """Return whether of every four consecutive inputs at most two are not zero; outputs are on `axis`."""
    inputs_first = np.moveaxis(weight, 1 - axis, 0)
    groups = (inputs_first != 0).reshape(-1, GROUP, *inputs_first.shape[1:])
    return bool((groups.sum(axis=1) <= NONZERO).all())
