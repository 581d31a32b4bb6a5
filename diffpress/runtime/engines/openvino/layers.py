"""Find the layers that OpenVINO executes on integers, from the compiled model.

The original model has the operations and their shapes; each layer of the compiled model lists the operations it was
made from (`originalLayersNames`), its type, and its execution precision.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from diffpress.runtime.engines import macs
from diffpress.runtime.engines.precision_report import UNMATCHED, Product

CONVOLUTIONS = {"Convolution", "GroupConvolution"}
TRANSPOSED = {"ConvolutionBackpropData", "GroupConvolutionBackpropData"}
INTEGERS = {"i8", "u8"}

# layer types of the compiled model
KERNELS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"}
SUBGRAPH = "Subgraph"
# suffixes that OpenVINO's transformations append to operation names
RESCALED = "/DequantizationMultiply"
WITHOUT_BIAS = "/WithoutBiases"


def products(model: Any, compiled: Any) -> Iterator[Product]:
    """Yield every operation of the original model at its current shapes; products inside a subgraph run in float."""
    ran: dict[str, tuple[bool, str]] = {}  # operation -> (on integers, reason if not)
    layers = compiled.get_runtime_model().get_ops()
    for layer in sorted(layers, key=is_integer):  # if an operation is in several layers, the integer one wins
        reason = "fused into a float subgraph" if layer_info(layer, "layerType") == SUBGRAPH else UNMATCHED
        for name in original_names(layer):
            ran[name.removesuffix(RESCALED)] = is_integer(layer), reason
    for operation in model.get_ops():
        integer, reason = ran.get(operation.get_friendly_name(), (False, UNMATCHED))
        yield Product(node_name(operation), operation_macs(operation), integer, reason)


def layer_names(compiled: Any) -> dict[str, tuple[str, ...]]:
    """Map each layer of the compiled model to its own name and those of its operations, without suffixes."""
    return {
        layer.get_friendly_name(): _without_suffixes([layer.get_friendly_name(), *original_names(layer)])
        for layer in compiled.get_runtime_model().get_ops()
    }


def operation_macs(operation: Any) -> int:
    """Return the MACs of one operation of the original model, at its current shapes."""
    kind = operation.get_type_name()
    if kind in CONVOLUTIONS:
        return macs.convolution(_out(operation), _in(operation, 1))
    if kind in TRANSPOSED:
        return macs.transposed_convolution(_in(operation, 0), _in(operation, 1))
    if kind == "MatMul":
        return macs.product(_in(operation, 0), _out(operation))
    if kind == "ScaledDotProductAttention":
        return macs.attention(_in(operation, 0), _in(operation, 1), _in(operation, 2))
    return 0


def is_integer(layer: Any) -> bool:
    """Return whether a layer of the compiled model multiplies integers."""
    return layer_info(layer, "layerType") in KERNELS and layer_info(layer, "runtimePrecision") in INTEGERS


def node_name(operation: Any) -> str:
    """Return the name of the operation's ONNX node.

    OpenVINO may give that name to the bias addition and a numbered name to the product; then the addition's name is
    returned. The name is lost for a product that is a graph output, which has the output's name.
    """
    name = str(operation.get_friendly_name()).removesuffix(WITHOUT_BIAS)
    if not re.fullmatch(rf"{operation.get_type_name()}_\d+", name):
        return name
    consumers = [target.get_node() for target in operation.output(0).get_target_inputs()]
    return next((str(node.get_friendly_name()) for node in consumers if node.get_type_name() == "Add"), name)


def original_names(layer: Any) -> list[str]:
    """Return the names of the original operations that a layer of the compiled model covers."""
    return layer_info(layer, "originalLayersNames").split(",")


def _without_suffixes(names: list[str]) -> tuple[str, ...]:
    """Remove transformation suffixes and duplicates."""
    return tuple(dict.fromkeys(name.removesuffix(RESCALED).removesuffix(WITHOUT_BIAS) for name in names if name))


def layer_info(layer: Any, key: str) -> str:
    """Return what the compiled model records of a layer under `key`, or ''."""
    info = layer.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _in(node: Any, index: int) -> list[int]:
    return list(node.input(index).get_shape())


def _out(node: Any) -> list[int]:
    return list(node.output(0).get_shape())
