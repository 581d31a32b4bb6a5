"""Scales of activations and weights, calibrated while the model samples under its own plan.

Weights have one amax per output channel or block, activations one per tensor. Activation statistics are streamed over
the states of the model's own trajectories, so they cover the inputs and timesteps of deployment, and memory holds the
statistics only.

With `reduce_range` a weight's amax is multiplied by 127/64, which keeps its integers within -64..64: CPUs without VNNI
add two products of a uint8 and an int8 in 16 bits, and 2 * 255 * 64 is the largest sum that fits (the documentation of
onnxruntime and NNCF recommends the same).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.calibration.clip_range import amax_of
from diffpress.compress.quantization.calibration.observer import CalibrationData, Observer
from diffpress.compress.quantization.calibration.statistics import Statistics, empty_statistics, update_statistics_
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, INT8, LEAST_MAGNITUDE
from diffpress.runtime.errors import InvalidInputError

LEVELS, REDUCED_LEVELS = 127, 64

Tensors = dict[str, torch.Tensor]


def calibrate(
    dataset: CalibrationData,
    formats: Mapping[str, str],
    outputs: Iterable[str],
    smooth: Mapping[str, torch.Tensor],
    config: QuantizeConfig,
) -> Tensors:
    """Calibrate every quantizer; if no activation is quantized, the model is not run.

    Args:
        dataset: The float model, and what it is evaluated on.
        formats: Layer -> format name.
        outputs: Modules whose outputs are quantized too (layer_selection.py).
        smooth: Layer -> smoothing vector.
        config: Settings of the stage.

    Returns:
        The amax of every quantizer, '<layer>.<weight|input|output>' -> float32 tensor, without tensors that are always
        zero, and without layers that have such a weight or input: they cannot be scaled.

    Raises:
        InvalidInputError: A value is not finite, in a trajectory; the message names the layer.
        NonFiniteError: A value is not finite, in other data.
    """
    modules = dict(dataset.model.named_modules())
    quantized_inputs = [name for name, kind in formats.items() if FORMATS[kind].activations]
    keys = [f"{name}.input" for name in quantized_inputs] + [f"{name}.output" for name in outputs]
    statistics = empty_statistics(keys, dataset.evaluations_per_batch)
    observers: dict[str, Observer] = {key: partial(update_statistics_, statistics, i) for i, key in enumerate(keys)}
    for name, s in smooth.items():
        if (key := f"{name}.input") in observers:
            observers[key] = partial(_observe_smoothed, observers[key], 1 / along(s, modules[name]))
    if keys:
        dataset.observe("calibrate", observers, statistics.tensors)
    return _amax(dataset.model, formats, statistics, smooth, config)


def check_calibration(formats: Mapping[str, str], config: QuantizeConfig) -> None:
    """Raise InvalidInputError, naming a layer, if the calibration method does not apply to one of the formats."""
    for name, kind in formats.items():
        number = FORMATS[kind].activations
        if config.calibration.method == "entropy" and number and not number.is_integer:
            raise InvalidInputError(
                f"quantize: calibration entropy requires integer formats, but layer '{name}' is in {kind}; "
                "use mse, percentile or max"
            )


def _observe_smoothed(observe: Observer, factor: torch.Tensor, x: torch.Tensor, evaluation: int, samples: int) -> None:
    observe(x * factor.to(x.device), evaluation, samples)


def _amax(
    model: nn.Module,
    formats: Mapping[str, str],
    statistics: Statistics,
    smooth: Mapping[str, torch.Tensor],
    config: QuantizeConfig,
) -> Tensors:
    modules: dict[str, Any] = dict(model.named_modules())
    found: Tensors = {}
    for name, kind in formats.items():
        layer, form = modules[name], FORMATS[kind]
        weight = layer.weight.detach().float().cpu()
        if name in smooth:
            weight = weight * along(smooth[name], layer)
        # products can overflow only where the engine multiplies integers
        reduced = config.reduce_range and form.weights is INT8 and form.activations is INT8
        found[f"{name}.weight"] = weight_amax(weight, form) * (LEVELS / REDUCED_LEVELS if reduced else 1.0)
    method, percentile = config.calibration.method, config.calibration.percentile
    for i, key in enumerate(statistics.names):
        name = key.rpartition(".")[0]
        number = (FORMATS[formats[name]].activations if name in formats else None) or INT8
        found[key] = torch.tensor(amax_of(statistics, i, method, number, percentile))
    zero = {key for key, value in found.items() if not (value >= LEAST_MAGNITUDE).all()}
    unscaled = {key.rpartition(".")[0] for key in zero if not key.endswith(".output")}
    return {key: value for key, value in found.items() if key not in zero and key.rpartition(".")[0] not in unscaled}
