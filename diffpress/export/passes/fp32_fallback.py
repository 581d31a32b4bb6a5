"""Which nodes of a graph compute in float32 when the rest computes in half precision.

    dangerous      norms, softmax, large sums, squares, powers, exponentials: they overflow or cancel
    not yet met    all that has met no layer: timesteps and their sinusoids, masks, positions, the sample itself
    kept           layers that the model's authors name (transformers' and diffusers' _keep_in_fp32_modules)
    between        what lies on a way from one of these to another without a layer on it: epsilons, masked scores
    finishing      arithmetic on nothing but results and operands of an island: x * rsqrt(mean x^2), scale and shift

Whatever overflows float16 but not float32 must do so inside: x^2 for |x| > 255, sums over a channel, exp(x) for x > 11;
a timestep of 999 is 1000 in bfloat16, and 1e-8 is 0 in float16. What joins an island as 'finishing' adds no Cast: its
operands are there in float32 already. Sigmoid, tanh and erf saturate and stay outside.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import onnx

from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.export.passes.quantize_weights import layer_of

NORMS = {"InstanceNormalization", "LayerNormalization", "GroupNormalization", "BatchNormalization"}
NORMS |= {"RMSNormalization", "MeanVarianceNormalization", "LpNormalization", "LRN"}
SUMS = {"ReduceMean", "ReduceSum", "ReduceSumSquare", "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp"}
SUMS |= {"ReduceProd", "GlobalAveragePool", "CumSum"}
SOFTMAX = {"Softmax", "LogSoftmax"}
FUNCTIONS = {"Exp", "Log", "Pow", "Sqrt", "Reciprocal", "Softplus", "Sin", "Cos"}
DANGEROUS = NORMS | SUMS | SOFTMAX | FUNCTIONS

ROUNDING = {"QuantizeLinear", "DequantizeLinear"}
PATH_ENDS = {*WEIGHT_INPUT, "Einsum"} - {"Gather"} | ROUNDING
ARITHMETIC = {"Add", "Sub", "Mul", "Div", "Neg"}
MOVING = {"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Flatten", "Expand", "Slice", "Split", "Concat", "Identity"}
MASKING = {"Add", "Sub", "Mul", "Div", "Where"}


def fp32_nodes(
    graph: onnx.GraphProto, floats: set[str], lacking: Collection[str] = (), keep: Collection[str] = ()
) -> set[int]:
    """Indices of the nodes that compute in float32.

    `floats` are the names of all float32 tensors, `lacking` operators that half precision does not have; `keep` are
    names of modules, 'wo', of which a layer's name has one as a part or several in a row.
    """
    stored = _stored(graph)
    found = {
        index
        for index, node in enumerate(graph.node)
        if node.op_type in DANGEROUS or node.op_type in lacking or _is_square(node) or _is_kept(node, keep)
    }
    found |= _not_met(graph, stored)
    _mask_(graph, found)
    while True:
        more = _between(graph, floats, found) | _finishing(graph, floats - stored, found)
        if more <= found:
            return found
        found |= more


def _stored(graph: onnx.GraphProto) -> set[str]:
    """Initializers, and what is computed from nothing else, as a weight is that was stored in few bits."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and found.issuperset(name for name in node.input if name):
            found.update(node.output)
    return found


def _is_square(node: onnx.NodeProto) -> bool:
    return node.op_type == "Mul" and node.input[0] == node.input[1]


def _is_kept(node: onnx.NodeProto, keep: Collection[str]) -> bool:
    return any(f".{module}." in f".{layer_of(node)}." for module in keep)


def _not_met(graph: onnx.GraphProto, stored: set[str]) -> set[int]:
    """Nodes that depend on inputs of the graph, through no layer; what becomes of weights alone is none of them."""
    fresh, found = {value.name for value in graph.input}, set()
    for index, node in enumerate(graph.node):
        index_of_weight = WEIGHT_INPUT.get(node.op_type)
        layer = index_of_weight is not None and node.input[index_of_weight] in stored
        if node.op_type in ROUNDING or layer or stored.issuperset(node.output):
            continue
        if fresh.issuperset(name for name in node.input if name and name not in stored):
            found.add(index)
            fresh.update(node.output)
    return found


def _mask_(graph: onnx.GraphProto, found: set[int]) -> None:
    """Add what masks or scales the scores that a softmax reads: half precision has no room for a mask's -3e38."""
    readers = _readers(graph)
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type in MASKING and node.output[0] in readers:
            after = [(reader, graph.node[reader].op_type) for reader in readers[node.output[0]]]
            if all(kind in SOFTMAX or (kind in MASKING and reader in found) for reader, kind in after):
                found.add(index)


def _between(graph: onnx.GraphProto, floats: set[str], found: set[int]) -> set[int]:
    nodes = list(enumerate(graph.node))
    free = {i for i, node in nodes if i not in found and node.op_type not in PATH_ENDS}
    after: set[str] = set()  # floats that come from an island through free nodes
    for index, node in nodes:
        if index in found or (index in free and not after.isdisjoint(node.input)):
            after.update(name for name in node.output if name in floats)
    before: set[str] = set()
    for index, node in reversed(nodes):
        if index in found or (index in free and not before.isdisjoint(node.output)):
            before.update(name for name in node.input if name in floats)
    return {i for i, node in nodes if i in free and not after.isdisjoint(node.input) and before & set(node.output)}


def _finishing(graph: onnx.GraphProto, floats: set[str], found: set[int]) -> set[int]:
    made = {name for i in found for name in graph.node[i].output}
    there = made | {name for i in found for name in graph.node[i].input}
    more = set()
    for index, node in enumerate(graph.node):
        if index in found or node.op_type not in ARITHMETIC | MOVING:
            continue
        operands = floats.intersection(node.input)
        if operands & made and operands <= there:
            more.add(index)
            made.update(node.output)
            there.update(node.output)
    return more


def _readers(graph: onnx.GraphProto) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for index, name in _reads(graph):
        found.setdefault(name, []).append(index)
    return found


def _reads(graph: onnx.GraphProto) -> Iterator[tuple[int, str]]:
    for index, node in enumerate(graph.node):
        for name in node.input:
            yield index, name
