"""Scales of activations and weights, calibrated while the model samples under its own plan.

Weights have one amax per output channel or block, activations one per tensor. Activation statistics are streamed while
the model samples, so they cover the inputs and timesteps of deployment, and memory holds the statistics only. With
smoothing the model samples twice: the smoothing vectors (smoothquant.py) must be known before statistics are collected.

With `reduce_range` a weight's amax is multiplied by 127/64, which keeps its integers within -64..64: CPUs without VNNI
add two products of a uint8 and an int8 in 16 bits, and 2 * 255 * 64 is the largest sum that fits (the documentation of
onnxruntime and NNCF recommends the same).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.quantization.algorithms.awq import awq_vectors
from diffpress.compress.quantization.algorithms.smoothquant import along, smoothing
from diffpress.compress.quantization.calibration.clip_range import amax_of
from diffpress.compress.quantization.calibration.observer import Observer, collect_activations, evaluations_per_batch
from diffpress.compress.quantization.calibration.statistics import Statistics, empty_statistics, update_statistics_
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.runtime.errors import InvalidInputError

LEVELS, REDUCED_LEVELS = 127, 64

Tensors = dict[str, torch.Tensor]


def calibrate(
    checkpoint: Checkpoint, formats: Mapping[str, str], outputs: Iterable[str], config: QuantizeConfig, ctx: Context
) -> tuple[Tensors, Tensors]:
    """Calibrate every quantizer; if no activation is quantized, the model is not run.

    Args:
        checkpoint: The float checkpoint.
        formats: Layer -> format name.
        outputs: Modules whose outputs are quantized too (layer_selection.py).
        config: Settings of the stage.
        ctx: Seed, data and working folder of the stage.

    Returns:
        The amax of every quantizer, '<layer>.<weight|input|output>' -> float32 tensor, and layer -> smoothing vector.

    Raises:
        InvalidInputError: A scale is zero, infinite or missing, or a value is not finite; the message names the layer.
    """
    modules = dict(checkpoint.model.named_modules())
    numbers = {name: number for name, kind in formats.items() if (number := FORMATS[kind].activations)}
    floats = [name for name, number in numbers.items() if not number.is_integer]
    if config.calibration == "entropy" and floats:
        raise InvalidInputError(
            f"quantize: calibration entropy requires integer formats, but layer '{floats[0]}' is in "
            f"{formats[floats[0]]}; use mse, percentile or max"
        )
    smooth = smoothing(checkpoint, numbers, config, ctx) | awq_vectors(checkpoint, formats, config, ctx)
    keys = [f"{name}.input" for name in numbers] + [f"{name}.output" for name in outputs]
    statistics = empty_statistics(keys, evaluations_per_batch(checkpoint))
    observers: dict[str, Observer] = {key: partial(update_statistics_, statistics, i) for i, key in enumerate(keys)}
    for name, s in smooth.items():
        if name in numbers:
            observers[f"{name}.input"] = partial(
                _observe_smoothed, observers[f"{name}.input"], 1 / along(s, modules[name])
            )
    if keys:
        collect_activations(checkpoint, observers, statistics.tensors, "calibrate", config, ctx)
    return _amax(checkpoint, formats, statistics, smooth, config), smooth


def _observe_smoothed(observe: Observer, factor: torch.Tensor, x: torch.Tensor, evaluation: int, samples: int) -> None:
    observe(x * factor.to(x.device), evaluation, samples)


def _amax(
    checkpoint: Checkpoint, formats: Mapping[str, str], statistics: Statistics, smooth: Tensors, config: QuantizeConfig
) -> Tensors:
    modules: dict[str, Any] = dict(checkpoint.model.named_modules())
    found: Tensors = {}
    for name, kind in formats.items():
        layer, form = modules[name], FORMATS[kind]
        weight = layer.weight.detach().float().cpu()
        if name in smooth:
            weight = weight * along(smooth[name], layer)
        # products can overflow only where the engine multiplies integers
        reduced = config.reduce_range and form.weights is INT8 and form.activations is INT8
        found[f"{name}.weight"] = weight_amax(weight, form) * (LEVELS / REDUCED_LEVELS if reduced else 1.0)
    for i, key in enumerate(statistics.names):
        name = key.rpartition(".")[0]
        number = (FORMATS[formats[name]].activations if name in formats else None) or INT8
        found[key] = torch.tensor(amax_of(statistics, i, config.calibration, number, config.percentile))
    for key, value in found.items():
        if not (torch.isfinite(value).all() and (value > 0).all()):
            name, _, what = key.rpartition(".")
            raise InvalidInputError(
                f"quantize: the {what} scale of layer '{name}' is zero, infinite or missing; "
                f"keep the layer in float with ignored_layers: [{name}]"
            )
    return found
