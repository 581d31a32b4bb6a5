"""LoRA slots: a branch of low rank beside the layers of a float graph, whose factors are inputs of the graph.

    y = layer(x)    becomes    y = layer(x) + (x lora.down.<layer>) lora.up.<layer>      down [in, R], up [R, out]
    a convolution:             down [R, in, kh, kw] with the layer's stride and padding, up [out, R, 1, 1]

R is the number of slots times their rank. The branch reads the float activation and follows the bias, so that every
pass of LOWERING that comes after finds the layers as they were traced: a layer in few bits has its branch in float.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import onnx
from onnx import TensorProto, helper

from diffpress.export.graph.model import Graph, weight_of
from diffpress.export.graph.rewrite import Rewrite, copies
from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.export.passes.linear_to_conv1x1 import bias_additions
from diffpress.export.passes.quantize_weights import channel_axis, layer_of
from diffpress.runtime.lora.slots import DOWN, UP

LINEAR = ("MatMul", "Gemm")
KERNEL = ("dilations", "pads", "strides", "auto_pad", "kernel_shape")  # attributes that the branch shares

Shape = tuple[int, ...]


def slot_layers(graph: Graph, convolutions: bool = False) -> dict[str, Shape]:
    """Return the layers of a float graph that can have slots -> shape of the weight, [out, in] or [out, in, kh, kw].

    Args:
        graph: Graph of `trace`.
        convolutions: Include convolutions that are larger than 1 x 1.
    """
    found = {}
    for node, shape in _nodes(graph):
        if convolutions or all(side == 1 for side in shape[2:]):
            found[layer_of(node)] = shape
    return found


def with_lora_slots(graph: Graph, layers: dict[str, Shape], rank: int) -> Graph:
    """Return a copy of `graph` with branches of this total rank beside `layers` (of `slot_layers`), as new inputs."""
    rewrite = Rewrite(graph)
    branched = {node.name: node for node, _ in _nodes(graph) if layer_of(node) in layers}
    biases = {bias.name: product for product, bias in bias_additions(graph.proto.graph).items()}
    products = {node.output[0]: node for node in branched.values()}
    has_bias = set(biases.values())
    for node in copies(graph.proto.graph.node):
        rewrite.nodes.append(node)
        if node.name in branched and node.output[0] not in has_bias:
            _branch_(rewrite, node, branched[node.name])
        elif biases.get(node.name) in products:
            _branch_(rewrite, node, products[biases[node.name]])
    result = rewrite.graph()
    for layer, (out, width, *kernel) in layers.items():
        down, up = ([rank, width, *kernel], [out, rank, 1, 1]) if kernel else ([width, rank], [rank, out])
        for name, shape in ((f"{DOWN}{layer}", down), (f"{UP}{layer}", up)):
            result.proto.graph.input.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    return result


def _branch_(rewrite: Rewrite, end: onnx.NodeProto, layer_node: onnx.NodeProto) -> None:
    """Add the branch of a layer to what `end`, the layer's node or the addition of its bias, returns."""
    layer, name = layer_of(layer_node), layer_node.name
    narrow, wide, out = f"lora/{name}/narrow", f"lora/{name}/wide", end.output[0]
    end.output[0] = f"lora/{name}/without"
    kind, shared = ("MatMul", {}) if layer_node.op_type in LINEAR else ("Conv", _kernel(layer_node))
    up: dict[str, Any] = {} if kind == "MatMul" else {"kernel_shape": [1, 1]}
    rewrite.nodes += [
        helper.make_node(kind, [layer_node.input[0], f"{DOWN}{layer}"], [narrow], f"lora/{name}/down", **shared),
        helper.make_node(kind, [narrow, f"{UP}{layer}"], [wide], f"lora/{name}/up", **up),
        helper.make_node("Add", [end.output[0], wide], [out], f"lora/{name}/Add"),
    ]


def _kernel(node: onnx.NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute if entry.name in KERNEL}


def _nodes(graph: Graph) -> Iterator[tuple[onnx.NodeProto, Shape]]:
    """Yield the nodes of linear layers and ungrouped 2-D convolutions, and [out, in, ...] of their weights."""
    stored = {tensor.name for tensor in graph.proto.graph.initializer}
    for node in graph.proto.graph.node:
        if not layer_of(node) or node.op_type not in (*LINEAR, "Conv"):
            continue
        name = node.input[WEIGHT_INPUT[node.op_type]]
        if name not in stored:
            continue
        shape, axis = weight_of(graph, name).shape, channel_axis(node)
        if node.op_type in LINEAR and len(shape) == 2:
            yield node, (shape[axis], shape[1 - axis])
        elif node.op_type == "Conv" and len(shape) == 4 and _group(node) == 1:
            yield node, shape


def _group(node: onnx.NodeProto) -> int:
    return next((entry.i for entry in node.attribute if entry.name == "group"), 1)
