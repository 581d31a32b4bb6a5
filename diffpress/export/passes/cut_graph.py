"""The cached graph of a network: its graph with the features as inputs, and without what only they needed.

    denoiser.onnx           inputs                -> output, features
    denoiser.cached.onnx    inputs, features      -> output

It is cut from the written file, and refers to the same data file: the weights are stored once.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx

from diffpress.runtime.errors import InvalidInputError


def cached_file(file: str) -> str:
    """Return the name of a graph's cached graph: 'denoiser.cached.onnx'."""
    return f"{file.removesuffix('.onnx')}.cached.onnx"


def write_cached_graph(path: Path, cached: Path, features: Collection[str]) -> int:
    """Cut the graph in `path` at its features and write the rest to `cached`, in the same folder; return its bytes."""
    proto = onnx.load(path, load_external_data=False)
    cached.write_bytes(cut_graph(proto, features).SerializeToString(deterministic=True))
    return cached.stat().st_size


def cut_graph(proto: onnx.ModelProto, features: Collection[str]) -> onnx.ModelProto:
    """Return the graph from the features on; `features` are outputs of `proto` besides the first.

    Raises:
        InvalidInputError: Nothing would be left out.
    """
    cut = onnx.ModelProto()
    cut.CopyFrom(proto)
    graph = cut.graph
    outputs = {value.name: value for value in graph.output}
    producers = {name: node for node in graph.node for name in node.output}
    # a feature may be a copy of the tensor that the network reads
    aliases = {}
    for name in features:
        source = name
        while (node := producers.get(source)) is not None and node.op_type == "Identity":
            source = node.input[0]
            aliases[source] = name
    nodes = [node for node in graph.node if not set(node.output) & {*features, *aliases}]
    for node in nodes:
        for index, name in enumerate(node.input):
            node.input[index] = aliases.get(name, name)
    needed, kept = {graph.output[0].name}, []
    for node in reversed(nodes):
        if set(node.output) & needed:
            kept.append(node)
            needed |= {name for name in (*node.input, *_captured(node)) if name}
    if len(kept) >= len(graph.node) - len(aliases):
        raise InvalidInputError("step cache: the cut leaves no layer out; choose another cut")
    new = onnx.GraphProto(name=graph.name)
    new.node.extend(reversed(kept))
    new.initializer.extend(tensor for tensor in graph.initializer if tensor.name in needed)
    new.input.extend(value for value in graph.input if value.name in needed)
    new.input.extend(outputs[name] for name in features)
    new.output.append(graph.output[0])
    new.value_info.extend(value for value in graph.value_info if value.name in needed)
    cut.graph.CopyFrom(new)
    return cut


def _captured(node: onnx.NodeProto) -> set[str]:
    """Return the names that the bodies of a node's subgraphs read."""
    bodies = [attribute.g for attribute in node.attribute if attribute.HasField("g")]
    return {name for body in bodies for inner in body.node for name in (*inner.input, *_captured(inner))}
