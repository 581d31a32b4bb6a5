"""Float graph + scales -> Q/DQ graph that computes the same function as the fake-quantized torch model.

    activation   x -> QuantizeLinear -> DequantizeLinear     placement: export/passes/qdq_placement.py
    weight       initializer         -> DequantizeLinear     export/passes/quantize_weights.py

A layer with a '.weight' scale stores its weight in few bits without a float copy, so the file shrinks to about a
quarter. Without an '.input' scale the layer computes in float from the stored weight. An '.output' scale quantizes the
output of a layer, or of the sum at the end of a block.

Processors without VNNI add pairs of 8-bit products in 16 bits, which saturate if weights use their whole range: on
such a machine OpenVINO's SQNR fell from 32 to 24 dB. An amax of 127/64 times the largest weight prevents this.

Layers are found by the node names that `diffpress.export.graph.trace` assigns; weights are quantized when written.
"""

from __future__ import annotations

import numpy as np
import onnx

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.quantization.formats import FORMATS, FP4, INT8
from diffpress.export.graph.model import Graph
from diffpress.export.graph.rewrite import Rewrite, copies
from diffpress.export.graph.trace import SUMS, WEIGHT_INPUT
from diffpress.export.passes.dynamic_fp4 import quantize_dynamically_
from diffpress.export.passes.linear_to_conv1x1 import bias_additions, entry_layer
from diffpress.export.passes.qdq_placement import Placement
from diffpress.export.passes.quantize_weights import layer_of, quantize_weight
from diffpress.runtime.errors import InvalidInputError

KINDS = (".weight", ".input", ".output")
# operators that accept an output scale: layers, and the sums at the end of blocks
ROUNDED = ("Conv", "ConvTranspose", "Gemm", "MatMul", *SUMS)

Scales = dict[str, np.ndarray]


def insert_qdq(graph: Graph, quantization: Quantization, tensorrt: bool = False) -> Graph:
    """Return a copy of `graph` that computes in few bits where `quantization` has scales.

    Args:
        graph: Float graph, smoothed and with low-rank branches if `quantization` has them, of an opset that has the
            types of its formats.
        quantization: Formats and scales by layer.
        tensorrt: Write the graph for TensorRT, if it needs another form than engines on the CPU.

    Raises:
        InvalidInputError: If a scale is not positive and finite or does not match the layer's weight, or if the graph
            has no such layer; the message names the layer.
    """
    formats = quantization.layer_formats
    weights, inputs, outputs = (_scales(quantization, kind) for kind in KINDS)
    old = graph.proto.graph
    _check_layers(old, weights, inputs, outputs)
    rewrite = Rewrite(graph)
    placement = Placement(rewrite, tensorrt)
    biases = {bias.name: product for product, bias in bias_additions(old).items()}
    ends: dict[str, str] = {}  # product without its bias -> its layer, whose output follows the bias
    for node in copies(old.node):
        layer, form = layer_of(node), None
        if entry_layer(node) in inputs:
            placement.round_entry_(node, inputs[entry_layer(node)])
        if layer in weights:
            form = FORMATS[formats[layer]]
            if layer in inputs and form.activations is FP4:
                if tensorrt:
                    quantize_dynamically_(rewrite, node, inputs[layer])
            elif layer in inputs and form.activations:
                placement.round_input_(node, inputs[layer], form.activations)
            node.input[WEIGHT_INPUT[node.op_type]] = quantize_weight(rewrite, node, weights[layer], form, tensorrt)
        else:
            placement.round_product_(node)
        rewrite.nodes.append(node)
        ended = ends.pop(biases.get(node.name, ""), _module_of(node))
        if ended in outputs and node.op_type == "MatMul" and node.output[0] in biases.values():
            ends[node.output[0]] = ended
        elif ended in outputs:
            number = form.activations if form else None
            placement.round_output_(node, outputs[ended], number or INT8)
        else:
            placement.pass_on_(node)
    return rewrite.graph()


def _module_of(node: onnx.NodeProto) -> str:
    """Return the module the node is named after: the layer whose weight it applies, or the block it ends."""
    return node.name.partition("#")[0]


def _scales(quantization: Quantization, kind: str) -> Scales:
    """Return layer -> float32 scale(s): amax divided by the largest number of the layer's format."""
    found = {}
    for key, amax in quantization.amax.items():
        if not key.endswith(kind):
            continue
        layer = key.removesuffix(kind)
        form = FORMATS[quantization.format_of(layer)]
        largest = (form.weights if kind == ".weight" else form.activations or INT8).largest
        scale = np.atleast_1d(amax.detach().cpu().numpy().astype(np.float32)) / np.float32(largest)
        if scale.size == 0 or not (np.isfinite(scale).all() and (scale > 0).all()):
            raise InvalidInputError(
                f"layer '{layer}': its {kind[1:]} amax must be positive and finite ({_worst(scale, largest)} found); "
                "quantize again with other calibration data, or keep this layer in float"
            )
        found[layer] = scale
    return found


def _worst(scale: np.ndarray, largest: float) -> str:
    bad = scale[~(np.isfinite(scale) & (scale > 0))]
    return f"{float(bad[0]) * largest:g}" if bad.size else "nothing"


def _check_layers(graph: onnx.GraphProto, weights: Scales, inputs: Scales, outputs: Scales) -> None:
    layers = {layer_of(node) for node in graph.node}
    for layer in weights:
        if layer not in layers:
            raise InvalidInputError(
                f"layer '{layer}': the graph has no node that applies its weight; was it exported from another model?"
            )
    for layer in inputs:
        if layer not in weights:
            raise InvalidInputError(f"layer '{layer}': it has an input amax but no weight amax; quantize again")
    operators = {_module_of(node): node.op_type for node in graph.node}
    for name in outputs:
        if operators.get(name) not in ROUNDED:
            raise InvalidInputError(
                f"layer '{name}': only layers and residual sums accept an output amax, but this is a "
                f"{operators.get(name, 'module that is not in the graph')}"
            )
    for kind, scales in (("input", inputs), ("output", outputs)):
        for name, scale in scales.items():
            if scale.size != 1:
                raise InvalidInputError(f"layer '{name}': its {kind} amax has {scale.size} values, but one is expected")
