"""Errors of steps that are not evaluated in full, measured on the trajectories of the plan without a cache.

Let out_j be the network's output in step j, and f_j(S) what a step predicts or computes in its place from the last full
steps S (runtime/caching). It moves the next sample by about

    error(S, j) = |d x' / d out| * mean over samples of rms(f_j(S) - out_j)

since one step of first order is linear in out. Forecasts need no further evaluations for it; cached steps need one for
each of the MAX_GAP - 1 full steps before j.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.compress.sampling_schedule.config import StepCacheConfig
from diffpress.compress.sampling_schedule.search import batches, final_samples
from diffpress.compress.sampling_schedule.step_patterns import MAX_GAP, Pattern
from diffpress.runtime.caching.features import FeatureReuse, SplitNetwork
from diffpress.runtime.caching.forecast import forecast_time, forecast_weights
from diffpress.runtime.caching.step_cache import CACHED, FULL
from diffpress.runtime.denoiser import denoiser_from_predictor, make_predictor
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0, transfer
from diffpress.runtime.sampling_plan import plan_steps
from diffpress.runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class Trajectories:
    """What the search needs of the trajectories without a cache.

    Attributes:
        products: Scalar products of the outputs of every two steps divided by their size, float64 [N, steps, steps].
        reused: rms of the error of step j with the features of step i, mean over samples, float64 [steps, steps]; zeros
            if kind features is not searched.
        gains: |d x' / d out| of every step.
        times: Time of every step's forecast.
        ends: Final samples, float32 [N, ...].
    """

    products: np.ndarray
    reused: np.ndarray
    gains: tuple[float, ...]
    times: tuple[float, ...]
    ends: np.ndarray

    def forecast_error(self, sources: Pattern, index: int) -> float:
        """Return the error of a forecast in step `index` from the last full steps `sources`, see above."""
        weights = forecast_weights([self.times[k] for k in sources], self.times[index])
        difference, chosen = np.array([*weights, -1.0]), [*sources, index]
        squares = np.einsum("i,nij,j->n", difference, self.products[:, chosen][:, :, chosen], difference)
        return self.gains[index] * float(np.sqrt(np.maximum(squares, 0.0)).mean())

    def reuse_error(self, sources: Pattern, index: int) -> float:
        """Return the error of a cached step `index` with the features of the last full step, see above."""
        return self.gains[index] * float(self.reused[sources[-1], index])


def sampled_trajectories(
    network: Any, spec: DenoiserSpec, config: StepCacheConfig, conditions: ConditioningInputs, reuses: bool = False
) -> Trajectories:
    """Sample the plan without a cache, and record what the search needs; `reuses` for kind features.

    Raises:
        InvalidInputError: The samples are NaN or infinite.
    """
    plan, products, ends = spec.plan, list[np.ndarray](), list[np.ndarray]()
    reused = np.zeros((plan.steps, plan.steps))
    for part in batches(config.samples, config.batch, "step cache: trajectories"):
        recorder = _Recorder(network, spec, conditions.part(part), reused if reuses else None)
        denoise = denoiser_from_predictor(recorder.record, spec, clip=plan.clip, threshold=plan.threshold)
        ends.append(final_samples(denoise, spec, plan, part))
        outputs = recorder.outputs
        flat = np.stack(outputs).reshape(plan.steps, len(outputs[0]), -1).astype(np.float64)
        products.append(np.einsum("ind,jnd->nij", flat, flat) / flat.shape[-1])
    final = np.concatenate(ends)
    if not np.isfinite(final).all():
        raise InvalidInputError(
            "schedule: cache: the samples of the plan contain NaN or infinite values; the search cannot run"
        )
    levels = plan_steps(spec.schedule, plan)
    return Trajectories(
        np.concatenate(products),
        reused / config.samples,
        tuple(_gain(spec, now, after) for now, after in levels),
        tuple(forecast_time(now) for now, _ in levels),
        final,
    )


class _Recorder:
    """Records the outputs of a batch's steps and adds the errors of cached steps to `reused`, if it is given."""

    def __init__(
        self, network: SplitNetwork, spec: DenoiserSpec, conditions: ConditioningInputs, reused: np.ndarray | None
    ) -> None:
        plan, self._reused, self._reuse = spec.plan, reused, FeatureReuse(network)
        self._predict = make_predictor(
            network if reused is None else self._reuse,
            spec,
            conditions=conditions,
            guidance=plan.guidance,
            interval=plan.guidance_interval,
            rescale=plan.guidance_rescale,
        )
        self._kept: deque[tuple[int, Any]] = deque(maxlen=MAX_GAP - 1)
        self.outputs: list[np.ndarray] = []

    def record(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        """Return the output of the whole network."""
        self._reuse.step = FULL
        out, index, own = self._predict(x, level), len(self.outputs), self._reuse.features
        self.outputs.append(out)
        if self._reused is not None:
            self._reuse.step = CACHED
            for source, features in self._kept:
                self._reuse.features = features
                difference = (self._predict(x, level) - out).reshape(len(out), -1)
                self._reused[source, index] += np.sqrt(np.square(difference, dtype=np.float64).mean(axis=1)).sum()
            self._kept.append((index, own))
        return out


def _gain(spec: DenoiserSpec, now: NoiseLevel, after: NoiseLevel) -> float:
    """Return |d x' / d out| of a step of first order."""
    return abs(float(transfer(0.0, to_x0(spec.prediction, 0.0, 1.0, now), now, after)))
