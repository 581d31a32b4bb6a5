"""The opset a graph needs for the number formats in it.

Graphs are traced at `diffpress.export.graph.trace.OPSET`, which gives the fastest ones; a format whose type came later raises the
number that the written file imports, and nothing else in it: between the two, the operators of our graphs gained types
and attributes whose defaults are what was there before (onnx's Changelog). GroupNormalization did not: it is refused.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from diffpress.compress.quantization.formats import FORMATS
from diffpress.export.graph.model import Graph
from diffpress.runtime.errors import InvalidInputError

# type -> the opset in which QuantizeLinear and DequantizeLinear take it; opset -> the IR version that goes with it
TYPE_OPSETS = {"float8_e4m3fn": 19, "int4": 21, "float4_e2m1fn": 23}
IR_VERSIONS = {19: 9, 21: 10, 22: 10, 23: 11}

# operator -> the first opset in which it means something else
REDEFINED = {"GroupNormalization": 21}


def needed_opset(formats: Iterable[str]) -> int:
    """The least opset that has the types of these formats, 0 where any will do."""
    numbers = [number for kind in formats for number in (FORMATS[kind].weights, FORMATS[kind].activations) if number]
    return max((TYPE_OPSETS.get(number.name, 0) for number in numbers), default=0)


def raised(graph: Graph, opset: int) -> Graph:
    """`graph` importing at least `opset`; InvalidInputError for an operator that means something else there."""
    if opset_of(graph) >= opset:
        return graph
    for node in graph.proto.graph.node:
        if REDEFINED.get(node.op_type, opset + 1) <= opset:
            raise InvalidInputError(
                f"node '{node.name}': {node.op_type} means something else in ONNX opset {opset}, which this format "
                "needs; take format int8"
            )
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    _default(proto).version = opset
    proto.ir_version = max(proto.ir_version, IR_VERSIONS[opset])
    imported = {entry.domain for entry in proto.opset_import} | {"", "ai.onnx"}
    for domain in sorted({node.domain for node in proto.graph.node} - imported):
        proto.opset_import.add(domain=domain, version=1)
    return Graph(proto, graph.weights)


def opset_of(graph: Graph) -> int:
    return int(_default(graph.proto).version)


def _default(proto: onnx.ModelProto) -> onnx.OperatorSetIdProto:
    return next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
