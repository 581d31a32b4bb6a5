"""ONNX opset that a graph's number formats require.

Graphs are traced at `diffpress.export.graph.trace.OPSET`, which gives the fastest graphs. A format whose type was added
in a later opset raises only the imported opset number: between the two versions, the operators in our graphs gained
types and attributes whose defaults keep the old behaviour (ONNX Changelog). GroupNormalization was redefined, so it is
rejected.
"""

from __future__ import annotations

from collections.abc import Iterable

import onnx

from diffpress.compress.quantization.formats import FORMATS
from diffpress.export.graph.model import Graph
from diffpress.runtime.errors import InvalidInputError

# type -> first opset whose QuantizeLinear and DequantizeLinear support it; opset -> its IR version
TYPE_OPSETS = {"float8_e4m3fn": 19, "int4": 21, "float4_e2m1fn": 23}
IR_VERSIONS = {19: 9, 21: 10, 22: 10, 23: 11}

# operator -> first opset with a redefined meaning
REDEFINED = {"GroupNormalization": 21}


def needed_opset(formats: Iterable[str]) -> int:
    """Return the lowest opset that supports the types of these formats, or 0 if any opset does."""
    numbers = [number for kind in formats for number in (FORMATS[kind].weights, FORMATS[kind].activations) if number]
    return max((TYPE_OPSETS.get(number.name, 0) for number in numbers), default=0)


def with_min_opset(graph: Graph, opset: int) -> Graph:
    """Return `graph` with an imported opset of at least `opset`.

    Raises:
        InvalidInputError: If an operator of the graph was redefined up to that opset.
    """
    if opset_of(graph) >= opset:
        return graph
    for node in graph.proto.graph.node:
        if REDEFINED.get(node.op_type, opset + 1) <= opset:
            raise InvalidInputError(
                f"node '{node.name}': {node.op_type} was redefined in ONNX opset {opset}, which this format requires; "
                "use format int8"
            )
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    _default(proto).version = opset
    proto.ir_version = max(proto.ir_version, IR_VERSIONS[opset])
    return Graph(proto, graph.weights)


def opset_of(graph: Graph) -> int:
    """Return the version of the default operator set that the graph imports."""
    return int(_default(graph.proto).version)


def _default(proto: onnx.ModelProto) -> onnx.OperatorSetIdProto:
    return next(entry for entry in proto.opset_import if entry.domain in ("", "ai.onnx"))
