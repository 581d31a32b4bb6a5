"""Forecast of the network's output from the outputs of earlier full steps.

With the outputs out_1, ..., out_n of the last n = order + 1 full steps (fewer at the start), at the times tau_i,

    forecast(tau) = sum_i w_i out_i        w_i = prod_{j != i} (tau - tau_j) / (tau_i - tau_j)

the polynomial through them: Newton's form of it has divided differences in the place of the derivatives of a Taylor
series (TaylorSeer, Liu et al. 2025; like OpenVINO GenAI's TaylorSeer-Lite, this predicts the network's last output
alone, not that of every block). TaylorSeer counts steps; here

    tau = log((alpha + SOFTENING) / (sigma + SOFTENING))

half the log-SNR, softened because it is infinite at pure noise and at clean data.

What is predicted is the output after guidance, before its correction and before x_0: one forecast replaces both
guidance halves, the solver sees an x_0 that belongs to its x, and clipping applies as usual.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from diffpress.runtime.caching.step_cache import FULL, StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel

if TYPE_CHECKING:
    from diffpress.runtime.denoiser import Predict

SOFTENING = 0.01


def forecast_time(level: NoiseLevel) -> float:
    """Return tau of a noise level, finite, and strictly increasing as the noise ratio falls."""
    return math.log((level.alpha + SOFTENING) / (level.sigma + SOFTENING))


def sources_of(cache: StepCache, index: int) -> tuple[int, ...]:
    """Return the full steps from whose outputs a forecast at step `index` is predicted, ascending."""
    return tuple(k for k in range(index) if cache.steps[k] == FULL)[-(cache.order + 1) :]


def forecast_weights(times: Sequence[float], time: float) -> tuple[float, ...]:
    """Return the weight of each earlier output in the forecast: those of the polynomial through their times.

    Raises:
        InvalidInputError: Two of the times are equal, as in a noise schedule with the same entry twice.
    """
    if len(set(times)) < len(times):
        raise InvalidInputError("plan: cache: two steps have the same noise level; use order 0, or remove one of them")
    return tuple(
        math.prod((time - other) / (own - other) for j, other in enumerate(times) if j != i)
        for i, own in enumerate(times)
    )


def weighted_outputs(outputs: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
    """Return the weighted sum of float32 arrays."""
    total = np.float32(weights[0]) * outputs[0]
    for weight, out in zip(weights[1:], outputs[1:], strict=True):
        total += np.float32(weight) * out
    return total


class Forecasting:
    """Predictor (x, level) -> output that evaluates the network in full steps and predicts its output in the others.

    It holds the outputs of one batch, and starts over at the first level of the plan.

    Attributes:
        cache: The step cache that it follows.
    """

    def __init__(self, predict: Predict, cache: StepCache, levels: Sequence[NoiseLevel]) -> None:
        self.cache, self._predict = cache, predict
        self._index = {level: index for index, level in enumerate(levels)}
        self._times = [forecast_time(level) for level in levels]
        self._outputs: dict[int, np.ndarray] = {}

    def __call__(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        """Return the output [N, ...] at one of the plan's levels."""
        index = self._index[level]
        if self.cache.steps[index] == FULL:
            earlier = [] if index == 0 else list(self._outputs.items())
            out = self._predict(x, level)
            self._outputs = dict([*earlier, (index, out)][-(self.cache.order + 1) :])
            return out
        sources = sources_of(self.cache, index)
        weights = forecast_weights([self._times[k] for k in sources], self._times[index])
        return weighted_outputs([self._outputs[k] for k in sources], weights)
