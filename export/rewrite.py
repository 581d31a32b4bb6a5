"""A graph being written from another one: initializers by name, nodes in order."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx
from onnx import TensorProto, numpy_helper

from export.graph import Graph, Weight, stub


@dataclass
class Rewrite:
    """`done` names what was made from a tensor and the bytes of its scale, so that it is made once."""

    source: Graph
    initializers: dict[str, TensorProto]
    weights: dict[str, Weight]
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    done: dict[tuple[str, bytes], str] = field(default_factory=dict)

    def add(self, name: str, value: np.ndarray) -> str:
        self.initializers[name] = numpy_helper.from_array(value, name)
        return name

    def add_weight(self, name: str, weight: Weight) -> str:
        self.initializers[name], self.weights[name] = stub(name, weight), weight
        return name

    def graph(self) -> Graph:
        """The graph as written, without initializers that nothing reads."""
        used = {name for node in self.nodes for name in node.input}
        model = self.source.proto
        old = model.graph
        graph = onnx.GraphProto(name=old.name, node=self.nodes, input=old.input, output=old.output)
        graph.initializer.extend(tensor for name, tensor in self.initializers.items() if name in used)
        proto = onnx.ModelProto(
            ir_version=model.ir_version,
            producer_name=model.producer_name,
            producer_version=model.producer_version,
            opset_import=model.opset_import,
            graph=graph,
        )
        return Graph(proto, {name: weight for name, weight in self.weights.items() if name in used})
