"""Builder that rewrites an ONNX graph: initializers by name, nodes in order."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from diffpress.export.graph.model import Graph, Weight, stub


@dataclass
class Rewrite:
    """Graph under construction; starts with the initializers and weights of `source` and no nodes.

    `done` maps (tensor, scale bytes) to the tensor created for them, so that each is created only once.
    """

    source: Graph
    initializers: dict[str, TensorProto] = field(init=False)
    weights: dict[str, Weight] = field(init=False)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    done: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.initializers = {tensor.name: tensor for tensor in self.source.proto.graph.initializer}
        self.weights = dict(self.source.weights)

    def add(self, name: str, value: np.ndarray) -> str:
        """Add a small constant, stored in the proto; returns its name."""
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def add_weight(self, name: str, weight: Weight) -> str:
        """Add a weight that is read when the graph is written; returns its name."""
        self.initializers[name], self.weights[name] = stub(name, weight), weight
        return name

    def graph(self) -> Graph:
        """Return the rewritten graph without unused nodes and initializers; it imports the domain of every node."""
        model = self.source.proto
        old = model.graph
        nodes = ancestors(self.nodes, [value.name for value in old.output])
        used = {name for node in nodes for name in node.input}
        graph = onnx.GraphProto(name=old.name, node=nodes, input=old.input, output=old.output)
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        proto = onnx.ModelProto(
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            opset_import=model.opset_import,
            graph=graph,
        )
        imported = {entry.domain for entry in proto.opset_import} | {"", "ai.onnx"}
        for domain in sorted({node.domain for node in nodes} - imported):
            proto.opset_import.add(domain=domain, version=1)
        return Graph(proto, {name: weight for name, weight in self.weights.items() if name in used})


def ancestors(nodes: Sequence[onnx.NodeProto], names: Iterable[str]) -> list[onnx.NodeProto]:
    """Return those of `nodes` (in topological order) that the tensors `names` depend on, in the same order."""
    needed, found = set(names), []
    for node in reversed(nodes):
        if not needed.isdisjoint(node.output):
            needed.update(node.input)
            found.append(node)
    return found[::-1]


def copies(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    """Yield a copy of each node, which may be modified."""
    for original in nodes:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        yield node
