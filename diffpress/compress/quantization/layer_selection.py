"""The format of every layer, by the first rule that applies.

unsupported                         float: layer_kinds.py gives the reasons
ignored_layers, format_overrides    the pattern with the most letters that matches gives the format, or float
sensitive, or not among `layers`    float arithmetic; linear layers still store their weights as int8, because
                                    time and class embeddings add much to file size and little to latency
all others                          the stage's format; fp8 where nvfp4 does not fit

A pattern is a prefix of layer names ('mid_block' covers a whole block), or has wildcards (*, ?, [...]) and matches the
complete name of a layer or of a module around it: 'blocks.*.attn' covers 'blocks.3.attn.to_q'.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.compress.quantization.layer_graph import LayerGraph
from diffpress.compress.quantization.layer_kinds import ALL_ZERO, KINDS, LAYERS, NOT_CALLED, TRANSPOSED, unsupported
from diffpress.runtime.errors import InvalidInputError

FLOAT = "float"
WILDCARDS = re.compile(r"[*?\[]")


def choose_formats(model: nn.Module, config: QuantizeConfig) -> dict[str, str]:
    """Return layer -> format name, in the model's order, without layers kept in float.

    Raises:
        InvalidInputError: A pattern matches no layer, no layer is left, or the formats cannot be combined in one model.
    """
    layers = dict(model.named_modules())
    wanted = _wanted_formats(model, config)
    chosen = {
        name: _supported_format(kind, layers[name]) for name, kind in wanted.items() if not unsupported(layers[name])
    }
    if not chosen:
        raise nothing_quantized(config.format, {name: unsupported(layers[name]) for name in wanted})
    _check_formats_combine(set(chosen.values()))
    return chosen


def nothing_quantized(kind: str, reasons: Mapping[str, str]) -> InvalidInputError:
    """Return the error for a model without a quantized layer, with the `reasons` of its layers."""
    why = described(reasons) or "all are sensitive or ignored"
    return InvalidInputError(f"quantize: no layer of the model can be in {kind}: {why}; remove the stage")


def described(reasons: Mapping[str, str]) -> str:
    """Return the layers with the same reason together, as 'a, b (never called); c (all zero)'."""
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return "; ".join(f"{', '.join(names)} ({reason})" for reason, names in groups.items())


def reasons_for_float(
    model: nn.Module, config: QuantizeConfig, graph: LayerGraph, quantized: Iterable[str]
) -> dict[str, str]:
    """Return layer -> why it is not among the `quantized` layers, for those that the settings do not keep in float."""
    modules, quantized = dict(model.named_modules()), set(quantized)
    return {
        name: unsupported(modules[name]) or (ALL_ZERO if name in graph.ranks else NOT_CALLED)
        for name in _wanted_formats(model, config)
        if name not in quantized
    }


def _wanted_formats(model: nn.Module, config: QuantizeConfig) -> dict[str, str]:
    """Return layer -> format name that the settings ask for, also of layers that are unsupported."""
    candidates: Any = (*LAYERS, *TRANSPOSED)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, candidates)}
    overrides = {**dict.fromkeys(config.ignored_layers, FLOAT), **config.format_overrides}
    _check_patterns_match(model, layers, overrides, config.ignored_layers)
    sensitive_layers = set(adapter_for(model).sensitive_layers(model)) if config.keep_sensitive_layers else set()
    kinds = tuple(kind for name in config.layers for kind in KINDS[name])
    if "conv" in config.layers:
        kinds += TRANSPOSED
    chosen: dict[str, str] = {}
    for name, layer in layers.items():
        patterns = [pattern for pattern in overrides if matches(name, pattern)]
        if patterns:
            chosen[name] = overrides[max(patterns, key=lambda pattern: len(WILDCARDS.sub("", pattern)))]
        elif name not in sensitive_layers and isinstance(layer, kinds):
            chosen[name] = config.format
        elif isinstance(layer, nn.Linear):
            chosen[name] = "int8_weight_only"
    return {name: kind for name, kind in chosen.items() if kind != FLOAT}


def matches(name: str, pattern: str) -> bool:
    """Return whether a layer's name matches a pattern (see the top of this file)."""
    if WILDCARDS.search(pattern):
        return fnmatchcase(name, pattern) or fnmatchcase(name, f"{pattern}.*")
    return name.startswith(pattern)


def _check_patterns_match(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    overrides: Mapping[str, str],
    ignored: Sequence[str],
    stage: str = "quantize",
) -> None:
    """Raise InvalidInputError for a pattern without effect; layers that are float anyway may be kept in float."""
    modules = dict(model.named_modules())
    for pattern, kind in overrides.items():
        names = modules if kind == FLOAT else layers
        matched = [name for name in names if matches(name, pattern)]
        where = f"{stage}: {'ignored_layers' if pattern in ignored else 'format_overrides'}"
        if not matched:
            near = get_close_matches(pattern, [name for name in modules if name], n=3, cutoff=0.4)
            hint = f"; similar names: {', '.join(near)}" if near else ""
            verb = "matches" if WILDCARDS.search(pattern) else "starts with"
            raise InvalidInputError(f"{where}: no layer name of the model {verb} '{pattern}'{hint}")
        reasons = [unsupported(layers[name]) for name in matched] if kind != FLOAT else [""]
        if all(reasons):
            raise InvalidInputError(f"{where}: '{matched[0]}' cannot be in {kind}: {reasons[0]}; remove '{pattern}'")


def check_ignored_layers(model: nn.Module, layers: Mapping[str, nn.Module], ignored: Sequence[str], stage: str) -> None:
    """Raise InvalidInputError for a pattern that matches no module."""
    _check_patterns_match(model, layers, dict.fromkeys(ignored, FLOAT), ignored, stage)


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
    linear = {name for name in integer if isinstance(modules[name], KINDS["linear"])}
    rounded = [name for name in integer if name not in linear or (graph.ranks.get(name) == 3 and not config.svdquant)]
    # sums inside modules with another format are not quantized either
    overridden = (
        *config.ignored_layers,
        *(name for name, kind in config.format_overrides.items() if kind != config.format),
    )
    convolutions = set(rounded) - linear
    residual_outputs = [
        name
        for name in adapter_for(model).residual_outputs(model)
        if convolutions and not any(matches(name, pattern) for pattern in overridden)
    ]
    return [*rounded, *(name for name in residual_outputs if name not in rounded)]
