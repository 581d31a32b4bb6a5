"""The file of a sampler graph, with each weight in the subgraph that reads it.

ONNX Runtime converts a convolution to its blocked layout only if the weight is an initializer of the same graph. In
float32 the sampler of a small U-Net takes 1.5 times as long with its weights outside the Loop's body (processor with
AVX-512, one thread).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import onnx

from diffpress.export.graph.model import Graph, save_graph


def save_sampler(graph: Graph, path: Path) -> int:
    """Write a sampler graph (+ .data above 2 GiB); returns the bytes written."""
    size = save_graph(graph, path)
    data = size - path.stat().st_size
    proto = onnx.load(path, load_external_data=False)
    move_initializers_(proto.graph)
    path.write_bytes(proto.SerializeToString(deterministic=True))
    return data + path.stat().st_size


def move_initializers_(graph: onnx.GraphProto) -> None:
    """Move the initializers that one subgraph alone reads into it, at any depth."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    own = {name for node in graph.node for name in node.input} | {value.name for value in graph.output}
    readers = Counter(name for body in bodies for name in _names_read(body))
    moved = {tensor.name for tensor in graph.initializer if tensor.name not in own and readers[tensor.name] == 1}
    for body in bodies:
        read = _names_read(body) & moved
        body.initializer.extend(tensor for tensor in graph.initializer if tensor.name in read)
    kept = [tensor for tensor in graph.initializer if tensor.name not in moved]
    del graph.initializer[:]
    graph.initializer.extend(kept)
    for body in bodies:
        move_initializers_(body)


def _names_read(graph: onnx.GraphProto) -> set[str]:
    """Return the names that a graph's operators read, in its subgraphs as well."""
    names = {value.name for value in graph.output}
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.HasField("g"):
                names |= _names_read(attribute.g)
    return names
