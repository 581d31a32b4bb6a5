"""Float graph + scales -> int8 Q/DQ graph, whose integers are the engine's and whose algebra is the fake-quant model's.

    activation   x -> QuantizeLinear -> DequantizeLinear     q = clip(round(x / s), -128, 127),  s = amax / 127
    weight       int8 initializer    -> DequantizeLinear     q = clip(round(w / s), -127, 127),  s = amax[channel] / 127

Rounding is half to even and every zero point is 0. A layer's '.weight' scales store it as int8 and drop the float copy,
so the file shrinks to about a quarter; without an '.input' scale the layer computes in float from those integers. An
'.output' scale, for convolutions, is what makes ONNX Runtime run them on integers at all, for it has no integer
convolution with a float result: on the default teacher 75 ms a step instead of 170, where fp32 takes 118 (batch 8, one
thread, AVX2). OpenVINO needs none.

Processors without VNNI add pairs of 8-bit products in 16 bits, which saturate where weights use their whole range: on
such a machine OpenVINO's result fell from 32 to 24 dB. An amax of 127/64 times the largest weight rules this out.

A layer is found by the names that `export.trace` gives to nodes, and its weight is quantized when it is written. One
Q/DQ pair serves all readers of a tensor that share a scale, such as to_q, to_k and to_v.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import helper

from compress.checkpoint import Quantization
from export.graph import Graph
from export.quantized_weights import LEVELS, layer_of, quantize_weight
from export.rewrite import Rewrite
from export.trace import WEIGHT_INPUT
from runtime.errors import BadInput

FORMATS = ("int8",)
KINDS = (".weight", ".input", ".output")
CONVOLUTIONS = ("Conv", "ConvTranspose")
ZERO = "int8_zero"

Scales = dict[str, np.ndarray]


def insert_qdq(graph: Graph, quantization: Quantization) -> Graph:
    """`graph` (made by `export.to_onnx`), itself left as it is, computing in int8 where `quantization` has scales.

    Raises BadInput, naming the layer, for a scale that is not positive and finite or does not fit the layer's weight,
    and for a layer the graph does not have.
    """
    if quantization.format not in FORMATS:
        raise BadInput(f"quantization format '{quantization.format}' has no Q/DQ graph; known: {', '.join(FORMATS)}")
    weights, inputs, outputs = (_scales(quantization, kind) for kind in KINDS)
    old = graph.proto.graph
    _check_layers(old, weights, inputs, outputs)
    rewrite = Rewrite(graph, {tensor.name: tensor for tensor in old.initializer}, dict(graph.weights))
    rewrite.add(ZERO, np.zeros((), np.int8))
    for original in old.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        layer = layer_of(node)
        if layer in weights:
            index = WEIGHT_INPUT[node.op_type]
            if layer in inputs:
                node.input[1 - index] = _quantize_input(rewrite, node, inputs[layer])
            node.input[index] = quantize_weight(rewrite, node, weights[layer])
        rewrite.nodes.append(node)
        if layer in outputs:
            _quantize_output_(rewrite, node, outputs[layer])
    return rewrite.graph()


def _scales(quantization: Quantization, kind: str) -> Scales:
    """Layer -> float32 scale(s), amax / 127."""
    found = {}
    for key, amax in quantization.amax.items():
        if not key.endswith(kind):
            continue
        scale = amax.detach().cpu().numpy().astype(np.float32).reshape(-1) / np.float32(LEVELS)
        layer = key.removesuffix(kind)
        if scale.size == 0 or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise BadInput(
                f"layer '{layer}': its {kind[1:]} amax must be positive and finite ({_worst(scale)} found); "
                "quantize again with other calibration data, or keep this layer in float"
            )
        found[layer] = scale
    return found


def _worst(scale: np.ndarray) -> str:
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    return f"{float(bad[0]) * LEVELS:g}" if bad.size else "nothing"


def _check_layers(graph: onnx.GraphProto, weights: Scales, inputs: Scales, outputs: Scales) -> None:
    operators = {layer_of(node): node.op_type for node in graph.node}
    for layer in weights:
        if layer not in operators:
            raise BadInput(
                f"layer '{layer}': the graph has no node that applies its weight; was it exported from another model?"
            )
    for kind, scales in (("input", inputs), ("output", outputs)):
        for layer, scale in scales.items():
            if layer not in weights:
                raise BadInput(f"layer '{layer}': it has an {kind} amax but no weight amax; quantize again")
            if scale.size != 1:
                raise BadInput(f"layer '{layer}': its {kind} amax has {scale.size} values, one is expected")
    for layer in outputs:
        if operators[layer] not in CONVOLUTIONS:
            raise BadInput(f"layer '{layer}': only convolutions take an output amax, this is a {operators[layer]}")


def _quantize_input(rewrite: Rewrite, node: onnx.NodeProto, scale: np.ndarray) -> str:
    """The name of the node's activation after its Q/DQ pair."""
    tensor = node.input[1 - WEIGHT_INPUT[node.op_type]]
    key = (tensor, scale.tobytes())
    if key not in rewrite.done:
        rewrite.done[key] = _add_pair(rewrite, tensor, f"{node.name}.input", scale, f"{node.name}.input_dequantized")
    return rewrite.done[key]


def _quantize_output_(rewrite: Rewrite, node: onnx.NodeProto, scale: np.ndarray) -> None:
    """Put a Q/DQ pair between the node and the tensor it wrote, whose name its readers keep."""
    tensor = node.output[0]
    node.output[0] = f"{node.name}.output_float"
    _add_pair(rewrite, node.output[0], f"{node.name}.output", scale, tensor)


def _add_pair(rewrite: Rewrite, tensor: str, prefix: str, scale: np.ndarray, out: str) -> str:
    parameters = [rewrite.add(f"{prefix}_scale", scale.reshape(())), ZERO]
    integers = f"{prefix}_int8"
    rewrite.nodes.append(helper.make_node("QuantizeLinear", [tensor, *parameters], [integers], f"{prefix}/Q"))
    rewrite.nodes.append(helper.make_node("DequantizeLinear", [integers, *parameters], [out], f"{prefix}/DQ"))
    return out
