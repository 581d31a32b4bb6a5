"""Select the nodes that stay in float32 when the rest of a graph computes in half precision.

    dangerous      norms, softmax, large sums, squares, powers, exponentials: they overflow or cancel
    before layers  nodes not preceded by any layer: timesteps and their sinusoids, masks, positions, the sample itself
    kept           layers that the model's authors name (transformers' and diffusers' _keep_in_fp32_modules)
    between        nodes on a path between two of these without a layer: epsilons, masked scores
    finishing      arithmetic on only results and operands of such nodes: x * rsqrt(mean x^2), scale and shift

Values that overflow float16 but not float32 must do so within these nodes: x^2 for |x| > 255, sums over a channel,
exp(x) for x > 11. A timestep of 999 becomes 1000 in bfloat16, and 1e-8 becomes 0 in float16. 'Finishing' nodes add no
Cast, because their operands exist in float32. Sigmoid, tanh and erf saturate and need no fallback.
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
    """Return the indices of the nodes that compute in float32.

    Args:
        graph: The graph.
        floats: Names of all float32 tensors.
        lacking: Operators that the half-precision type does not support.
        keep: Module names such as 'wo'; a layer stays float32 if its name contains one as one or more full components.
    """
    stored = _stored(graph)
    found = {
        index
        for index, node in enumerate(graph.node)
        if node.op_type in DANGEROUS or node.op_type in lacking or _is_square(node) or _is_kept(node, keep)
    }
    found |= _before_layers(graph, stored)
    _mask_(graph, found)
    while True:
        more = _between(graph, floats, found) | _finishing(graph, floats - stored, found)
        if more <= found:
            return found
        found |= more


def _stored(graph: onnx.GraphProto) -> set[str]:
    """Return initializers and tensors computed only from them, such as a dequantized weight."""
    found = {tensor.name for tensor in graph.initializer}
    for node in graph.node:
        if node.input and found.issuperset(name for name in node.input if name):
            found.update(node.output)
    return found


def _is_square(node: onnx.NodeProto) -> bool:
    return node.op_type == "Mul" and node.input[0] == node.input[1]


def _is_kept(node: onnx.NodeProto, keep: Collection[str]) -> bool:
    return any(f".{module}." in f".{layer_of(node)}." for module in keep)


def _before_layers(graph: onnx.GraphProto, stored: set[str]) -> set[int]:
    """Return nodes that depend on graph inputs through no layer; nodes on weights alone are excluded."""
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
    """Add nodes that mask or scale the scores of a softmax: a mask's -3e38 does not fit half precision."""
    readers = _readers(graph)
    for index, node in reversed(list(enumerate(graph.node))):
        if node.op_type in MASKING and node.output[0] in readers:
            after = [(reader, graph.node[reader].op_type) for reader in readers[node.output[0]]]
            if all(kind in SOFTMAX or (kind in MASKING and reader in found) for reader, kind in after):
                found.add(index)


def _between(graph: onnx.GraphProto, floats: set[str], found: set[int]) -> set[int]:
    nodes = list(enumerate(graph.node))
    free = {i for i, node in nodes if i not in found and node.op_type not in PATH_ENDS}
    after: set[str] = set()  # floats that depend on a float32 node through free nodes
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
