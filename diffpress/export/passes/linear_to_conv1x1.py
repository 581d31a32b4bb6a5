"""Rewrite linear layers over a sequence as 1x1 convolutions: the same products, but faster as integers.

    x [B, L, I] -> Unsqueeze -> Transpose [B, I, L, 1] -> Conv [O, I, 1, 1] -> Transpose -> Squeeze -> [B, L, O]

Engines store the channels of integer convolutions innermost, as x does, so the transpositions move no data. On
processors without integer dot products, their kernels for such convolutions are far better than those for matrix
products: 384 -> 1536 -> 384 over 8 x 256 tokens, four times, took OpenVINO 260 ms in fp32, 262 ms as integer products
and 149 ms as convolutions; ONNX Runtime took 234, 260 and 117 ms (one thread, AVX2, minimum of eight alternating
rounds).

If the result is transposed again, to [B, O, L], the last two nodes are Squeeze -> Transpose: both transpositions then
cancel. OpenVINO 2026.4 drops one of them otherwise and returns the values in a wrong order. This does not happen to
rounded results that are added to one of a convolution, whose channels are innermost as well (attention of U-Nets).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from functools import partial

import numpy as np
import onnx
from onnx import helper

from diffpress.export.graph.model import Graph, Weight, weight_of
from diffpress.export.graph.rewrite import Rewrite
from diffpress.export.graph.trace import SUMS
from diffpress.export.passes.quantize_weights import layer_of

AXIS, LAST_AXIS = "sequence_axis", "last_axis"
SWAPPED = [0, 2, 1]
# operators that act on each value separately
ELEMENTWISE = {
    *("Abs", "Add", "Cast", "Celu", "Clip", "Cos", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "LeakyRelu", "Log", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid"),
    *("Sin", "Softplus", "Softsign", "Sqrt", "Sub", "Swish", "Tanh", "ThresholdedRelu"),
}
# name prefixes: the node that reads the layer's input, and the transposed tensor
ENTRY, CHANNELS = "enter/", "channels/"


def linear_to_conv1x1(graph: Graph, layers: Collection[str], rounded: Collection[str] = ()) -> Graph:
    """Return a copy of `graph` with `layers` that are MatMuls over [B, L, I] rewritten as convolutions.

    The outputs of those in `rounded` will be quantized.

    The convolutions keep the layers' names and include their biases. Layers over other shapes are not changed.

    `graph` comes from `diffpress.export.graph.to_onnx`.
    """
    old, ranks, biases = graph.proto.graph, _ranks(graph.proto), bias_additions(graph.proto.graph)
    rewrite = Rewrite(graph)
    rewrite.add(AXIS, np.array([2], np.int64))
    merged: set[str] = set()
    for node in old.node:
        if node.op_type == "MatMul" and layer_of(node) in layers and ranks.get(node.input[0]) == 3:
            bias = biases.get(node.output[0])
            merged |= {bias.name} if bias is not None else set()
            transposed = _is_transposed(old, (bias or node).output[0], layer_of(node) in rounded)
            _convolve_(rewrite, node, bias, transposed)
        elif node.name not in merged:
            rewrite.nodes.append(node)
    return rewrite.graph()


def entry_layer(node: onnx.NodeProto) -> str:
    """Return the layer whose convolution starts with this node, or '' if none does."""
    return node.name.removeprefix(ENTRY).partition("#")[0] if node.name.startswith(ENTRY) else ""


def conv_input_of(node: onnx.NodeProto) -> str:
    """Return the tensor read by the convolution that starts with this node."""
    return f"{CHANNELS}{node.name.removeprefix(ENTRY)}"


def bias_additions(graph: onnx.GraphProto) -> dict[str, onnx.NodeProto]:
    """Return MatMul output -> the Add of a stored vector that is its only reader."""
    products = {node.output[0] for node in graph.node if node.op_type == "MatMul"}
    vectors = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    readers = Counter(name for node in graph.node for name in node.input)
    found = {}
    for node in graph.node:
        for term in node.input if node.op_type == "Add" else ():
            if term in products and readers[term] == 1 and _other(node, term) in vectors:
                found[term] = node
    return found


def _is_transposed(graph: onnx.GraphProto, tensor: str, rounded: bool) -> bool:
    """Return whether [B, L, O] or an elementwise function of it is transposed to [B, O, L], which OpenVINO drops."""
    stored = {initializer.name for initializer in graph.initializer}
    derived = {tensor}
    for node in graph.node:
        computed = [name for name in node.input if name and name not in stored]
        if not computed or not derived.issuperset(computed):
            continue
        swapped = node.op_type == "Transpose" and _permutation(node) == SWAPPED
        if swapped and not (rounded and _added_to_convolution(graph, node)):
            return True
        if node.op_type in ELEMENTWISE:
            derived.update(node.output)
    return False


def _added_to_convolution(graph: onnx.GraphProto, transpose: onnx.NodeProto) -> bool:
    """Return whether a transposed tensor is only reshaped and then added to a convolution, or a sum with one."""
    tensor = transpose.output[0]
    reshapes = [node for node in graph.node if tensor in node.input]
    if [node.op_type for node in reshapes] != ["Reshape"]:
        return False
    tensor = reshapes[0].output[0]
    sums = [node for node in graph.node if tensor in node.input]
    if [node.op_type for node in sums] != ["Add"]:
        return False
    makers = {name: node for node in graph.node for name in node.output}
    todo = [_other(sums[0], tensor)]
    while todo:
        maker = makers.get(todo.pop())
        if maker is not None and maker.op_type == "Conv":
            return True
        if maker is not None and maker.op_type in SUMS:
            todo += maker.input
    return False


def _permutation(node: onnx.NodeProto) -> list[int]:
    return next((list(entry.ints) for entry in node.attribute if entry.name == "perm"), [])


def _convolve_(rewrite: Rewrite, node: onnx.NodeProto, bias: onnx.NodeProto | None, transposed: bool) -> None:
    name, out = node.name, (bias or node).output[0]
    weight = weight_of(rewrite.source, node.input[1])
    in_channels, out_channels = weight.shape
    kernel = Weight(weight.dtype, (out_channels, in_channels, 1, 1), partial(_kernel, weight))
    inputs = [f"{CHANNELS}{name}", rewrite.add_weight(f"{node.input[1]}_1x1", kernel)]
    if bias is not None:
        inputs.append(_other(bias, node.output[0]))
    rewrite.nodes += [
        helper.make_node("Unsqueeze", [node.input[0], AXIS], [f"rows/{name}"], f"{ENTRY}{name}"),
        helper.make_node("Transpose", [f"rows/{name}"], inputs[:1], f"transpose/{name}", perm=[0, 3, 1, 2]),
        helper.make_node("Conv", inputs, [f"convolved/{name}"], name, kernel_shape=[1, 1]),
    ]
    if transposed:
        axis = rewrite.add(LAST_AXIS, np.array([3], np.int64))
        rewrite.nodes += [
            helper.make_node("Squeeze", [f"convolved/{name}", axis], [f"out/{name}"], f"return/{name}"),
            helper.make_node("Transpose", [f"out/{name}"], [out], f"leave/{name}", perm=SWAPPED),
        ]
        return
    rewrite.nodes += [
        helper.make_node("Transpose", [f"convolved/{name}"], [f"out/{name}"], f"return/{name}", perm=[0, 2, 3, 1]),
        helper.make_node("Squeeze", [f"out/{name}", AXIS], [out], f"leave/{name}"),
    ]


def _kernel(weight: Weight) -> np.ndarray:
    return weight.read().T[:, :, None, None]


def _other(addition: onnx.NodeProto, term: str) -> str:
    return next(name for name in addition.input if name != term)


def _ranks(model: onnx.ModelProto) -> dict[str, int]:
    """Return tensor -> number of dimensions, as far as ONNX can infer it."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    values = [*graph.input, *graph.value_info]
    return {value.name: len(value.type.tensor_type.shape.dim) for value in values}
