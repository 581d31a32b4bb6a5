"""Which layer gets which format.

Fragile layers keep float arithmetic; of these the linear ones (time and class embedding) store their weights as int8
all the same, since they weigh much in the file and little in time.
"""

from __future__ import annotations

from torch import nn

from compress.adapters import adapter_for
from compress.config import QuantizeConfig
from compress.quantization.formats import FORMATS
from runtime.errors import BadInput

KINDS: dict[str, type[nn.Module]] = {"conv": nn.Conv2d, "linear": nn.Linear}


def choose_formats(model: nn.Module, config: QuantizeConfig) -> dict[str, str]:
    """Layer -> name of its format, in the model's order; layers that stay in float are not in it."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, tuple(KINDS.values()))}
    unknown = [name for name in config.keep if not any(layer.startswith(name) for layer in layers)]
    if unknown:
        raise BadInput(f"quantize: keep names '{unknown[0]}', and no layer of the model begins so")
    fragile = set(adapter_for(model).fragile(model))
    kinds = tuple(KINDS[kind] for kind in config.layers)
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        if any(name.startswith(prefix) for prefix in config.keep):
            continue
        if name not in fragile and isinstance(layer, kinds):
            chosen[name] = config.format
        elif isinstance(layer, nn.Linear):
            chosen[name] = "int8_weight_only"
    return chosen


def rounded_outputs(model: nn.Module, formats: dict[str, str], config: QuantizeConfig) -> list[str]:
    """The layers whose outputs are rounded too: ONNX Runtime has no integer convolution with a float result."""
    if not config.outputs:
        return []
    modules = dict(model.named_modules())
    convolutions = [name for name in formats if isinstance(modules[name], nn.Conv2d)]
    return [name for name in convolutions if FORMATS[formats[name]].activations is not None]
