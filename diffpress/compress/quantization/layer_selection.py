"""The format of every layer, by the first rule that applies.

ignored_layers, format_overrides    the longest matching prefix of the layer's name gives its format, or float
sensitive, or not among `layers`    float arithmetic; linear layers still store their weights as int8, because
                                    time and class embeddings add much to file size and little to latency
all others                          the stage's format; fp8 where nvfp4 does not fit
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.compress.quantization.layer_graph import LayerGraph
from diffpress.runtime.errors import InvalidInputError

KINDS: dict[str, type[nn.Module]] = {"conv": nn.Conv2d, "linear": nn.Linear}
FLOAT = "float"


def choose_formats(model: nn.Module, config: QuantizeConfig) -> dict[str, str]:
    """Return layer -> format name, in the model's order, without layers kept in float.

    Raises:
        InvalidInputError: A prefix matches no layer, or the formats cannot be combined in one model.
    """
    every = tuple(KINDS.values())
    layers: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, every)}
    overrides = {**dict.fromkeys(config.ignored_layers, FLOAT), **config.format_overrides}
    _check_prefixes_match(layers, ignored_layers=config.ignored_layers, format_overrides=config.format_overrides)
    sensitive_layers = set(adapter_for(model).sensitive_layers(model)) if config.keep_sensitive_layers else set()
    kinds = tuple(KINDS[kind] for kind in config.layers)
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        prefixes = [prefix for prefix in overrides if name.startswith(prefix)]
        if prefixes:
            chosen[name] = overrides[max(prefixes, key=len)]
        elif name not in sensitive_layers and isinstance(layer, kinds):
            chosen[name] = config.format
        elif isinstance(layer, nn.Linear):
            chosen[name] = "int8_weight_only"
    chosen = {name: _supported_format(kind, layers[name]) for name, kind in chosen.items() if kind != FLOAT}
    _check_formats_combine(set(chosen.values()))
    return chosen


def _check_prefixes_match(layers: Iterable[str], **settings: Iterable[str]) -> None:
    for setting, prefixes in settings.items():
        for prefix in prefixes:
            if not any(layer.startswith(prefix) for layer in layers):
                raise InvalidInputError(f"quantize: {setting}: no layer name of the model starts with '{prefix}'")


def _supported_format(kind: str, layer: nn.Module) -> str:
    """Return `kind`, or fp8 where GPUs do not support nvfp4: convolutions, widths not divisible by the block."""
    blocks = isinstance(layer, nn.Linear) and layer.in_features % FORMATS["nvfp4"].block == 0
    return "fp8" if kind == "nvfp4" and not blocks else kind


def _check_formats_combine(kinds: set[str]) -> None:
    integers = sorted(kind for kind in kinds if FORMATS[kind].activations is INT8)
    if "fp8" in kinds and integers:
        raise InvalidInputError(
            f"quantize: fp8 and {integers[0]} in one model: OpenVINO 2026.4 cannot compile both activation formats; "
            "combine fp8 only with int4, int8_weight_only or float"
        )


def quantized_outputs(
    model: nn.Module, graph: LayerGraph, formats: Mapping[str, str], config: QuantizeConfig
) -> list[str]:
    """Return the modules whose outputs are quantized too.

    These are the integer layers, because ONNX Runtime has no integer kernels with a float result, and the residual sums
    of blocks, so that tensors stay in integers between blocks (unified_scales.py).

    Excluded are linear layers on embeddings [B, C], which cost almost nothing and some of which OpenVINO 2026.4 cannot
    compile with a quantized output, and linear layers with a low-rank branch (svdquant.py), which end in a float sum.
    """
    if not config.outputs:
        return []
    modules = dict(model.named_modules())
    integer = [name for name, kind in formats.items() if FORMATS[kind].activations is INT8]
    linear = {name for name in integer if isinstance(modules[name], nn.Linear)}
    rounded = [name for name in integer if name not in linear or (graph.ranks.get(name) == 3 and not config.svdquant)]
    # sums inside modules with another format are not quantized either
    overridden = (
        *config.ignored_layers,
        *(name for name, kind in config.format_overrides.items() if kind != config.format),
    )
    convolutions = set(rounded) - linear
    residual_outputs = [
        name for name in adapter_for(model).residual_outputs(model) if convolutions and not name.startswith(overridden)
    ]
    return [*rounded, *(name for name in residual_outputs if name not in rounded)]
