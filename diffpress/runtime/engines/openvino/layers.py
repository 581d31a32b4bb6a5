"""Which layers OpenVINO executes on integers, read from the model that it compiled.

The graph as read has the operations and their shapes; a layer of the compiled model names the operations that it was
made of (`originalLayersNames`), its type, and the precision it runs in.
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

# types of executed layers
KERNELS = {"Convolution", "Deconvolution", "FullyConnected", "MatMul", "ScaledDotProductAttention"}
SUBGRAPH = "Subgraph"
# what its transformations put behind the name of an operation
RESCALED = "/DequantizationMultiply"
WITHOUT_BIAS = "/WithoutBiases"


def products(model: Any, compiled: Any) -> Iterator[Product]:
    """Every operation of the model as read, at the shapes it has now; products inside a subgraph run in float."""
    ran: dict[str, tuple[bool, str]] = {}  # operation -> whether on integers, else why not
    layers = compiled.get_runtime_model().get_ops()
    for layer in sorted(layers, key=_is_integer):  # an operation that is in several is where the integers are
        reason = "fused into a float subgraph" if _info(layer, "layerType") == SUBGRAPH else UNMATCHED
        for name in _made_of(layer):
            ran[name.removesuffix(RESCALED)] = _is_integer(layer), reason
    for operation in model.get_ops():
        integer, reason = ran.get(operation.get_friendly_name(), (False, UNMATCHED))
        yield Product(_named(operation), _operation_macs(operation), integer, reason)


def layer_names(compiled: Any) -> dict[str, tuple[str, ...]]:
    """Layer of the compiled model -> its own name and those of its operations, without what the compiler put behind."""
    return {
        layer.get_friendly_name(): _plain([layer.get_friendly_name(), *_made_of(layer)])
        for layer in compiled.get_runtime_model().get_ops()
    }


def _operation_macs(operation: Any) -> int:
    """Multiply-accumulates of one operation of the graph as read, at the shapes it was last reshaped to."""
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


def _is_integer(layer: Any) -> bool:
    return _info(layer, "layerType") in KERNELS and _info(layer, "runtimePrecision") in INTEGERS


def _named(operation: Any) -> str:
    """Its ONNX node's name; where OpenVINO gave that to the addition of the bias, and it a number, the addition's.

    Lost for a product that is itself an output of the graph, which has the output's name.
    """
    name = str(operation.get_friendly_name()).removesuffix(WITHOUT_BIAS)
    if not re.fullmatch(rf"{operation.get_type_name()}_\d+", name):
        return name
    readers = [target.get_node() for target in operation.output(0).get_target_inputs()]
    return next((str(node.get_friendly_name()) for node in readers if node.get_type_name() == "Add"), name)


def _made_of(layer: Any) -> list[str]:
    return _info(layer, "originalLayersNames").split(",")


def _plain(names: list[str]) -> tuple[str, ...]:
    """Each of the names once, as they were before the transformations."""
    return tuple(dict.fromkeys(name.removesuffix(RESCALED).removesuffix(WITHOUT_BIAS) for name in names if name))


def _info(layer: Any, key: str) -> str:
    info = layer.get_rt_info()
    return str(info[key].astype(str)) if key in info else ""


def _in(node: Any, index: int) -> list[int]:
    return list(node.input(index).get_shape())


def _out(node: Any) -> list[int]:
    return list(node.output(0).get_shape())
