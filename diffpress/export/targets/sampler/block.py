"""Blocks of an ONNX graph under construction: operators in order, with the initializers of the whole graph.

A Loop's body and the branches of an If are blocks of their own. They read tensors of the enclosing blocks by name, and
all initializers are in the main graph until it is written (placement.py), each once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, compose, helper, numpy_helper

from diffpress.export.graph.model import Graph, Weight

BATCH = "batch"
MAIN_DOMAINS = ("", "ai.onnx")


@dataclass
class Parts:
    """What all blocks of a graph share: initializers, weights, imported operator sets, and the last number in use."""

    initializers: dict[str, TensorProto] = field(default_factory=dict)
    weights: dict[str, Weight] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    ir_version: int = 0
    count: int = 0


@dataclass
class Block:
    """Operators in order; every method that adds some returns the names of their outputs."""

    parts: Parts = field(default_factory=Parts)
    nodes: list[onnx.NodeProto] = field(default_factory=list)

    def inner(self) -> Block:
        """Return an empty block for a subgraph."""
        return Block(self.parts)

    def op(self, kind: str, *inputs: str, **attributes: Any) -> str:
        """Add an operator with one output."""
        return self.split_op(kind, *inputs, outputs=1, **attributes)[0]

    def split_op(self, kind: str, *inputs: str, outputs: int, **attributes: Any) -> list[str]:
        """Add an operator with several outputs."""
        self.parts.count += 1
        name = f"sampler/{kind}_{self.parts.count}"
        names = [name if outputs == 1 else f"{name}:{index}" for index in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, name=name, **attributes))
        return names

    def named(self, name: str, tensor: str) -> None:
        """Give a tensor another name."""
        self.nodes.append(helper.make_node("Identity", [tensor], [name], name=f"sampler/{name}"))

    def constant(self, value: Any, dtype: Any = np.float32) -> str:
        """Add a constant; equal ones share one initializer."""
        array = np.asarray(value, dtype)
        content = numpy_helper.from_array(array)
        for name, tensor in self.parts.initializers.items():
            if name.startswith("sampler/constant_") and _same(tensor, content):
                return name
        self.parts.count += 1
        name = f"sampler/constant_{self.parts.count}"
        self.parts.initializers[name] = numpy_helper.from_array(array, name)
        return name

    def cast(self, tensor: str, dtype: Any, found: Any = None) -> str:
        """Convert a tensor to a dtype, unless `found` is that dtype already."""
        if found is not None and np.dtype(found) == np.dtype(dtype):
            return tensor
        return self.op("Cast", tensor, to=helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def repeated(self, value: Any, rows: str, dtype: Any = np.float32) -> str:
        """Repeat an array [...] `rows` times, a tensor int64 [1]: the result is [rows, ...]."""
        array = np.asarray(value, dtype)
        ones = self.constant([1] * array.ndim, np.int64)
        shape = self.op("Concat", rows, ones, axis=0) if array.ndim else rows
        return self.op("Expand", self.constant(array[None], dtype), shape)

    def network(self, graph: Graph, name: str, feed: Mapping[str, str]) -> list[str]:
        """Add all operators of another graph, with `feed` as its inputs; returns its outputs in order.

        Its tensors are renamed to '<name>/...'.
        """
        inner = onnx.GraphProto()
        inner.CopyFrom(graph.proto.graph)
        prefix = f"{name}/"
        compose.add_prefix_graph(inner, prefix, inplace=True)
        for value in inner.input:
            given = feed[value.name.removeprefix(prefix)]
            self.nodes.append(helper.make_node("Identity", [given], [value.name], name=f"{value.name}/feed"))
        self.nodes.extend(inner.node)
        self.parts.initializers |= {tensor.name: tensor for tensor in inner.initializer}
        self.parts.weights |= {prefix + key: weight for key, weight in graph.weights.items()}
        for entry in graph.proto.opset_import:
            domain = "" if entry.domain in MAIN_DOMAINS else entry.domain
            self.parts.opsets[domain] = max(self.parts.opsets.get(domain, 0), entry.version)
        self.parts.ir_version = max(self.parts.ir_version, graph.proto.ir_version)
        return [value.name for value in inner.output]

    def subgraph(
        self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]
    ) -> onnx.GraphProto:
        """Return the block as the body of a Loop or a branch of an If."""
        return helper.make_graph(self.nodes, name, inputs, outputs)

    def graph(self, name: str, inputs: Sequence[onnx.ValueInfoProto], outputs: Sequence[onnx.ValueInfoProto]) -> Graph:
        """Return the block as a whole graph, with all initializers."""
        graph = helper.make_graph(self.nodes, name, inputs, outputs, initializer=list(self.parts.initializers.values()))
        opsets = [helper.make_opsetid(domain, version) for domain, version in sorted(self.parts.opsets.items())]
        proto = helper.make_model(graph, opset_imports=opsets, ir_version=self.parts.ir_version)
        proto.producer_name = "diffpress"
        return Graph(proto, dict(self.parts.weights))


def value_info(name: str, dtype: Any, shape: Sequence[int | str] | None) -> onnx.ValueInfoProto:
    """Return the description of a tensor; a shape of None leaves it to the engine."""
    return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(np.dtype(dtype)), shape)


def dtypes_of(values: Sequence[onnx.ValueInfoProto]) -> dict[str, np.dtype]:
    """Return the dtypes of a graph's inputs or outputs by name."""
    return {value.name: np.dtype(helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type)) for value in values}


def _same(one: TensorProto, other: TensorProto) -> bool:
    return (one.data_type, list(one.dims), one.raw_data) == (other.data_type, list(other.dims), other.raw_data)
