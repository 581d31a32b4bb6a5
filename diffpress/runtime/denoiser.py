"""The denoiser contract of every solver: denoise(x, level) -> x_0, made of a network and a spec.

predict   the network's output; under guidance the cond and uncond halves share one batch (guidance.py)
forecast  in its place, in steps that a step cache leaves out (caching/forecast.py)
correct   (out - bias[channel]) / (1 + slope), per timestep (sampling_plan.OutputCorrection)
x_0       from the output, by the prediction type (parameterization.py)
bound     clip to the data range, or dynamic thresholding (sampling_plan.Threshold)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import numpy as np

from diffpress.runtime.caching.features import FeatureReuse, Reusing, SplitNetwork, check_split
from diffpress.runtime.caching.forecast import Forecasting
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import Interval, guidance_applies, is_guided, rescaled
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    Network,
    check_inputs,
    network_conditioning,
    network_feed,
)
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import OutputCorrection, Threshold, plan_steps
from diffpress.runtime.spec import DenoiserSpec

Denoise = Callable[[np.ndarray, NoiseLevel], np.ndarray]
Predict = Callable[[np.ndarray, NoiseLevel], np.ndarray]


def make_denoiser(
    network: Network,
    spec: DenoiserSpec,
    *,
    conditions: ConditioningInputs | None = None,
    guidance: float = 1.0,
    clip: bool = True,
    output_corrections: Mapping[float, OutputCorrection] | None = None,
    threshold: Threshold | None = None,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Denoise:
    """Return the function (x float32 [N, ...], level) -> x_0 of the same shape.

    Args:
        network: The denoiser network.
        spec: Its spec; the plan in it is ignored, see `plan_denoiser`.
        conditions: Conditioning of the N samples.
        guidance: Guidance weight; 1, or a weight that is an input of the network, takes one evaluation per step, any
            other weight two.
        clip: Clip x_0 to the data range.
        output_corrections: Corrections of the network's output by timestep.
        threshold: Dynamic thresholding, instead of clipping.
        interval: Guidance interval in sigma / alpha.
        rescale: phi of the rescaled guidance.

    Raises:
        InvalidInputError: The conditioning, the guidance or the graph's inputs do not match the spec.
    """
    predict = make_predictor(
        network, spec, conditions=conditions, guidance=guidance, interval=interval, rescale=rescale
    )
    return denoiser_from_predictor(predict, spec, clip=clip, output_corrections=output_corrections, threshold=threshold)


def plan_denoiser(network: Network, spec: DenoiserSpec, conditions: ConditioningInputs | None = None) -> Denoise:
    """Return `make_denoiser` with all options taken from the spec's plan, including its step cache."""
    plan = spec.plan
    return denoiser_from_predictor(
        plan_predictor(network, spec, conditions),
        spec,
        clip=plan.clip,
        output_corrections=dict(zip(plan.timesteps, plan.output_corrections, strict=False)),  # one each, or none
        threshold=plan.threshold,
    )


def plan_predictor(network: Network, spec: DenoiserSpec, conditions: ConditioningInputs | None = None) -> Predict:
    """Return the function (x, level) -> network output with the guidance and the step cache of the spec's plan.

    With a step cache it belongs to one batch at a time.

    Raises:
        InvalidInputError: As in `make_denoiser`, or the network cannot follow the step cache.
    """
    plan, cache = spec.plan, spec.plan.cache
    reuse = None
    if cache is not None and not cache.is_idle and cache.kind == "features":
        check_split(network)
        network = reuse = FeatureReuse(cast(SplitNetwork, network))
    predict = make_predictor(
        network,
        spec,
        conditions=conditions,
        guidance=plan.guidance,
        interval=plan.guidance_interval,
        rescale=plan.guidance_rescale,
    )
    if cache is None:
        return predict
    levels = [level for level, _ in plan_steps(spec.schedule, plan)]
    return Forecasting(predict, cache, levels) if reuse is None else Reusing(reuse, predict, cache, levels)


class CachedDenoiser:
    """A denoiser (x, level) -> x_0 that follows a step cache.

    Attributes:
        cache: The step cache.
    """

    def __init__(self, denoise: Denoise, cache: StepCache) -> None:
        self._denoise, self.cache = denoise, cache

    def __call__(self, x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        """Return x_0 [N, ...] at a level of the plan."""
        return self._denoise(x, level)


def make_predictor(
    network: Network,
    spec: DenoiserSpec,
    *,
    conditions: ConditioningInputs | None = None,
    guidance: float = 1.0,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Predict:
    """Return the function (x, level) -> network output after guidance: the first half of `make_denoiser`."""
    check_inputs(network, spec)
    conditions = conditions or ConditioningInputs()
    cond_only = network_conditioning(spec, conditions, guided=False)
    both = network_conditioning(spec, conditions, guided=True) if is_guided(spec, guidance) else cond_only

    def predict(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        if spec.fixed_timesteps and level.t not in spec.fixed_timesteps:
            raise InvalidInputError(
                f"timestep {level.t:g} is not one of the {len(spec.fixed_timesteps)} that this network was exported "
                "for, but the plan's solver evaluates it; use another solver, or export again without --fixed-timesteps"
            )
        weight = guidance if guidance_applies(interval, level) else 1.0
        if not is_guided(spec, weight):
            return network.run(network_feed(network, spec, x, level.t, cond_only, weight))
        out = network.run(network_feed(network, spec, np.concatenate([x, x]), level.t, both, weight))
        cond, uncond = np.split(out, 2)
        mixed: np.ndarray = uncond + weight * (cond - uncond)
        return rescaled(mixed, cond, rescale) if rescale > 0 else mixed

    return predict


def denoiser_from_predictor(
    predict: Predict,
    spec: DenoiserSpec,
    *,
    clip: bool = True,
    output_corrections: Mapping[float, OutputCorrection] | None = None,
    threshold: Threshold | None = None,
) -> Denoise:
    """Return the function (x, level) -> x_0 for the outputs of `predict`: the second half of `make_denoiser`."""
    low, high = spec.data_range
    corrections = {} if output_corrections is None else output_corrections

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        out = predict(x, level)
        if level.t in corrections:
            out = corrected(out, corrections[level.t])
        x0 = to_x0(spec.prediction, x, out, level)
        if threshold is not None:
            return thresholded(x0, threshold, spec.data_range)
        return np.clip(x0, low, high) if clip else x0

    return CachedDenoiser(denoise, predict.cache) if isinstance(predict, Forecasting | Reusing) else denoise


def thresholded(x0: np.ndarray, threshold: Threshold, data_range: tuple[float, float]) -> np.ndarray:
    """Apply dynamic thresholding (sampling_plan.Threshold) to x_0 [N, ...] of data in any range."""
    middle, half = sum(data_range) / 2.0, (data_range[1] - data_range[0]) / 2.0
    unit = (x0 - middle) / half
    s = np.quantile(np.abs(unit).reshape(len(unit), -1), threshold.ratio, axis=1)
    s = np.clip(s, 1.0, threshold.max).astype(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    result: np.ndarray = np.clip(unit, -s, s) / s * half + middle
    return result


def corrected(out: np.ndarray, correction: OutputCorrection) -> np.ndarray:
    """Return the corrected outputs (out - bias[channel]) / (1 + slope), float32 [N, C, ...]."""
    bias = np.asarray(correction.bias, np.float32).reshape(-1, *[1] * (out.ndim - 2))
    result: np.ndarray = (out - bias) * np.float32(1.0 / (1.0 + correction.slope))
    return result
