"""Which layer gets which format.

keep, mixture                       the longest prefix of a layer's name decides, where any does: a format or float
fragile, or not among `layers`      float arithmetic; linear layers store their weights as int8 all the same, since
                                    time and class embeddings weigh much in the file and little in time
the rest                            the stage's format, but fp8 where nvfp4 does not fit
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs

KINDS: dict[str, type[nn.Module]] = {"conv": nn.Conv2d, "linear": nn.Linear}
FLOAT = "float"


def choose_formats(model: nn.Module, config: QuantizeConfig) -> dict[str, str]:
    """Layer -> name of its format, in the model's order; layers that stay in float are not in it."""
    every = tuple(KINDS.values())
    layers: dict[str, nn.Module] = {name: module for name, module in model.named_modules() if isinstance(module, every)}
    overrides = {**dict.fromkeys(config.ignored_layers, FLOAT), **config.format_overrides}
    _refuse_unknown(layers, ignored_layers=config.ignored_layers, format_overrides=config.format_overrides)
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
    chosen = {name: _suited(kind, layers[name]) for name, kind in chosen.items() if kind != FLOAT}
    _refuse_clash(set(chosen.values()))
    return chosen


def _refuse_unknown(layers: Iterable[str], **settings: Iterable[str]) -> None:
    for setting, prefixes in settings.items():
        for prefix in prefixes:
            if not any(layer.startswith(prefix) for layer in layers):
                raise InvalidInputError(f"quantize: {setting} names '{prefix}', and no layer of the model begins so")


def _suited(kind: str, layer: nn.Module) -> str:
    """`kind`, or fp8 for what GPUs do not multiply in nvfp4: convolutions, and widths that are not whole blocks."""
    blocks = isinstance(layer, nn.Linear) and layer.in_features % FORMATS["nvfp4"].block == 0
    return "fp8" if kind == "nvfp4" and not blocks else kind


def _refuse_clash(kinds: set[str]) -> None:
    integers = sorted(kind for kind in kinds if FORMATS[kind].activations is INT8)
    if "fp8" in kinds and integers:
        raise InvalidInputError(
            f"quantize: fp8 and {integers[0]} in one model: OpenVINO 2026.4 cannot compile both kinds of activations; "
            "mix fp8 with int4, int8_weight_only or float"
        )


def rounded_outputs(checkpoint: Checkpoint, formats: dict[str, str], config: QuantizeConfig) -> list[str]:
    """The modules whose outputs are rounded too: layers on integers, which ONNX Runtime has no kernels with a float
    result for, and beside them the sums that blocks end in, so that integers flow (see trunk.py).

    Linear layers of embeddings [B, C] cost next to nothing, and OpenVINO 2026.4 cannot compile some whose outputs are
    rounded; one with a branch of low rank (low_rank.py) ends in a sum of its own. Both stay as they are.
    """
    if not config.outputs:
        return []
    model = checkpoint.model
    modules = dict(model.named_modules())
    integer = [name for name, kind in formats.items() if FORMATS[kind].activations is INT8]
    linear = {name for name in integer if isinstance(modules[name], nn.Linear)}
    left = linear if config.svdquant_rank else linear - _over_sequences(checkpoint, linear)
    rounded = [name for name in integer if name not in left]
    # what was told to be in another format takes its sums along
    apart = (*config.ignored_layers, *(name for name, kind in config.format_overrides.items() if kind != config.format))
    convolutions = set(rounded) - linear
    residual_outputs = [
        name for name in adapter_for(model).residual_outputs(model) if convolutions and not name.startswith(apart)
    ]
    return [*rounded, *(name for name in residual_outputs if name not in rounded)]


def _over_sequences(checkpoint: Checkpoint, layers: set[str]) -> set[str]:
    """Those of `layers` that read [B, L, C], by one call of the network."""
    found: set[str] = set()
    model = checkpoint.shared_model()
    for name in layers:
        look = lambda _, args, name=name: found.add(name) if args[0].dim() == 3 else None  # noqa: E731
        model.get_submodule(name).register_forward_pre_hook(look)
    if layers:
        network = TorchNetwork(model, checkpoint.spec)
        network.run(dummy_inputs(network, checkpoint.spec, 1))
    return found
