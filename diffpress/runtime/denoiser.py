"""From a network to one contract for every solver: denoise(x, point) -> x_0.

With x = alpha x_0 + sigma eps, each prediction is one linear map away from x_0 (float32 throughout):

    epsilon   x_0 = (x - sigma out) / alpha
    v         x_0 = (alpha x - sigma out) / (alpha^2 + sigma^2)        from out = alpha eps - sigma x_0
    sample    x_0 = out
    flow      x_0 = (x - sigma out) / (alpha + sigma)                  from out = eps - x_0

Classifier-free guidance (Ho & Salimans 2022) mixes out = null + w (label - null); the label half and the null
half go through the network in one call. Its spread, which w widens, may be taken back towards that of the label half
(Lin et al. 2024, eq. 15-16), out (phi std(label) / std(out) + 1 - phi), and outside an interval of noise the label half
goes alone (Kynkaanniemi et al. 2024). What rounding does to a quantized network on the average is taken off then,
(out - bias[channel]) / (1 + slope), each timestep's own (diffpress.runtime.sampling_plan.Correction).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import Interval, guidance_acts, is_guided, rescaled
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    Network,
    _network_conditioning,
    check_inputs,
    network_feed,
)
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import OutputCorrection, Threshold
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
    """The function (x float32 [N, C, H, W], point) -> x_0 of the same shape, for N samples under these conditions.

    `clip` bounds x_0 to the data range, `threshold` in its place; `output_corrections` go by timestep; `interval` and
    `rescale` are the plan's of guidance. A `guidance` of 1, or one that the network takes
    as an input, makes one network evaluation a step; any other weight makes two. Raises InvalidInputError where the conditions,
    the guidance or the graph's inputs do not fit the spec.
    """
    predict = make_predictor(
        network, spec, conditions=conditions, guidance=guidance, interval=interval, rescale=rescale
    )
    return denoiser_of(predict, spec, clip=clip, output_corrections=output_corrections, threshold=threshold)


def plan_denoiser(network: Network, spec: DenoiserSpec, conditions: ConditioningInputs | None = None) -> Denoise:
    """`make_denoiser` with everything as the spec's plan has it."""
    plan = spec.plan
    return make_denoiser(
        network,
        spec,
        conditions=conditions,
        guidance=plan.guidance,
        clip=plan.clip,
        output_corrections=dict(zip(plan.timesteps, plan.output_corrections, strict=False)),  # one for each, or none
        threshold=plan.threshold,
        interval=plan.guidance_interval,
        rescale=plan.guidance_rescale,
    )


def make_predictor(
    network: Network,
    spec: DenoiserSpec,
    *,
    conditions: ConditioningInputs | None = None,
    guidance: float = 1.0,
    interval: Interval | None = None,
    rescale: float = 0.0,
) -> Predict:
    """The function (x, point) -> the network's output after guidance; as `make_denoiser`, of which it is the half."""
    check_inputs(network, spec)
    conditions = conditions or ConditioningInputs()
    alone = _network_conditioning(spec, conditions, guided=False)
    both = _network_conditioning(spec, conditions, guided=True) if is_guided(spec, guidance) else alone

    def predict(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        if spec.fixed_timesteps and level.t not in spec.fixed_timesteps:
            raise InvalidInputError(
                f"timestep {level.t:g} is not one of the {len(spec.fixed_timesteps)} that this network was exported "
                "for, and the plan's solver asks there; take another solver, or export again without --fixed-plan"
            )
        weight = guidance if guidance_acts(interval, level) else 1.0
        if not is_guided(spec, weight):
            return network.run(network_feed(network, spec, x, level.t, alone, weight))
        out = network.run(network_feed(network, spec, np.concatenate([x, x]), level.t, both, weight))
        label, uncond = np.split(out, 2)
        mixed: np.ndarray = uncond + weight * (label - uncond)
        return rescaled(mixed, label, rescale) if rescale > 0 else mixed

    return predict


def denoiser_of(
    predict: Predict,
    spec: DenoiserSpec,
    *,
    clip: bool = True,
    output_corrections: Mapping[float, OutputCorrection] | None = None,
    threshold: Threshold | None = None,
) -> Denoise:
    """The other half: x_0 read off what `predict` returns, after the timestep's correction where it has one."""
    low, high = spec.data_range
    known = {} if output_corrections is None else output_corrections

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        out = predict(x, level)
        if level.t in known:
            out = corrected(out, known[level.t])
        x0 = to_x0(spec.prediction, x, out, level)
        if threshold is not None:
            return thresholded(x0, threshold, spec.data_range)
        return np.clip(x0, low, high) if clip else x0

    return denoise


def thresholded(x0: np.ndarray, threshold: Threshold, data_range: tuple[float, float]) -> np.ndarray:
    """x_0 [N, ...] by dynamic thresholding (diffpress.runtime.sampling_plan.Threshold), of data in any range."""
    middle, half = sum(data_range) / 2.0, (data_range[1] - data_range[0]) / 2.0
    unit = (x0 - middle) / half
    s = np.quantile(np.abs(unit).reshape(len(unit), -1), threshold.ratio, axis=1)
    s = np.clip(s, 1.0, threshold.max).astype(x0.dtype).reshape(-1, *[1] * (x0.ndim - 1))
    result: np.ndarray = np.clip(unit, -s, s) / s * half + middle
    return result


def corrected(out: np.ndarray, correction: OutputCorrection) -> np.ndarray:
    """(out - bias) / (1 + slope) of outputs [N, C, H, W], float32."""
    bias = np.asarray(correction.bias, np.float32)[:, None, None]
    result: np.ndarray = (out - bias) * np.float32(1.0 / (1.0 + correction.slope))
    return result
