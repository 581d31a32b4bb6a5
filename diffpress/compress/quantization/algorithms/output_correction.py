"""Per-timestep correction of the mean quantization error of the output, after PTQD (He et al. 2023).

Let `out` and `out_q` be the outputs of the float and the quantized network, after guidance, on the same states x_t of
the quantized model's own trajectory. The sampler (runtime/denoiser.py) computes

    (out_q - bias_t[channel]) / (1 + slope_t)      least squares fit to `out` over samples and pixels

with one slope for all channels, at most MAX_SLOPE. Each timestep is corrected before the next is measured, so the
states are those that the deployed sampler visits. PTQD regresses out_q on out instead. That slope is unbiased under
noise, but dividing by it amplifies the noise: on a coarsely quantized toy network it lost 1.3 dB where this fit gained
0.5. PTQD's third step, reducing the sampler's noise by the variance of the quantization noise, is not implemented: it
needs a stochastic sampler, and few plans use one.

A correction that makes each output better can make the trajectory worse: an epsilon model divides the error of its
first step by alpha, which may be 0.006. So the corrections are kept only if they bring whole trajectories closer to the
float model's, from noise that they were not fitted to.

They cost five times the evaluations of calibration, so that by default a model of more than 100 million parameters has
none: on a Stable Diffusion 1.5 U-Net they were left out anyway (19.1 dB with them, 20.1 without).

On the default teacher (int8, 64 samples) PSNR to the float model rose from 36.1 to 39.0 dB over 20 steps, from 36.0 to
38.3 over 8 and by 0.4 over 2; the mean of the samples, previously 0.013 too low, came within 0.002. After QAT there was
nothing to gain (38.4 and 38.3 dB over 8 steps).
"""

from __future__ import annotations

import itertools
import logging
from dataclasses import replace
from typing import Any

import numpy as np
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.seeds import OUTPUT_CORRECTION_SEED
from diffpress.runtime.denoiser import Predict, denoiser_from_predictor, plan_predictor
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.sampler import generate, noise_for, sample
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan
from diffpress.runtime.solvers import solver_evaluations
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

# a larger slope is no loss of amplitude: the quantization error outweighs the output, and no factor restores that
MAX_SLOPE = 0.25


def corrects_output(config: QuantizeConfig, model: nn.Module) -> bool:
    """Return whether corrections are to be measured, by the settings or, by default, the size of the model."""
    return not is_large(model) if config.output_correction is None else config.output_correction


def with_output_corrections(
    checkpoint: Checkpoint,
    reference: nn.Module,
    conditions: ConditioningInputs,
    samples: int,
    batch: int,
    notes: dict[str, Any],
) -> Checkpoint:
    """Return the quantized `checkpoint` with corrections towards `reference`, the float model, in its plan.

    Returns it unchanged if the corrections do not help; `notes` records both figures as 'output_correction'.
    """
    spec = checkpoint.spec
    network, exact = (TorchNetwork(model, spec) for model in (fake_quantized(checkpoint), reference))
    found = measure_corrections(network, exact, spec, samples, batch, conditions)
    corrected = replace(spec.plan, output_corrections=found)
    without_db, with_db = held_out_sqnr_db(network, exact, spec, (spec.plan, corrected), samples, batch, conditions)
    kept = helps(without_db, with_db)
    largest = max(abs(correction.slope) for correction in found)
    notes["output_correction"] = {
        "kept": kept,
        "held_out_samples": samples,
        "sqnr_db": round(float(with_db.mean()), 2),
        "sqnr_db_without": round(float(without_db.mean()), 2),
        "largest_slope": round(largest, 4),
    }
    logger.info(
        f"output corrections for {len(found)} timesteps, slopes up to {largest:.2%}: {'kept' if kept else 'left out'}, "
        f"{with_db.mean():.1f} dB SQNR with them and {without_db.mean():.1f} dB without, on {samples} other samples"
    )
    return checkpoint.evolve(spec=spec.with_plan(corrected)) if kept else checkpoint


def held_out_sqnr_db(
    network: Network,
    reference: Network,
    spec: DenoiserSpec,
    plans: tuple[SamplingPlan, ...],
    count: int,
    batch: int,
    conditions: ConditioningInputs,
) -> list[np.ndarray]:
    """Return the SQNR in dB of each of `count` samples of `network` to those of `reference`, for each plan.

    The noise follows that of `measure_corrections`, which the corrections were fitted to.
    """
    seeds = range(OUTPUT_CORRECTION_SEED + count, OUTPUT_CORRECTION_SEED + 2 * count)
    plain = spec.plan.without_corrections
    exact = generate(reference, spec, seeds, plan=plain, batch=batch, conditions=conditions)
    samples = (generate(network, spec, seeds, plan=plan, batch=batch, conditions=conditions) for plan in plans)
    return [np.array([sqnr_db(x, y) for x, y in zip(exact, found, strict=True)]) for found in samples]


def helps(without_db: np.ndarray, with_db: np.ndarray) -> bool:
    """Return whether the mean gain per sample exceeds twice its standard error; NaN does not."""
    gain = with_db - without_db
    error = gain.std(ddof=1) / np.sqrt(gain.size) if gain.size > 1 else 0.0
    return bool(gain.mean() > 2.0 * error)


def measure_corrections(
    network: Network, reference: Network, spec: DenoiserSpec, count: int, batch: int, conditions: ConditioningInputs
) -> tuple[OutputCorrection, ...]:
    """Measure the corrections of `network` towards `reference`, one for each timestep of the spec's plan.

    All `count` samples advance through the plan together; the networks evaluate `batch` of them at a time.

    Raises:
        InvalidInputError: The outputs do not correlate or are not finite; the message names the timestep.
    """
    plan = spec.plan.without_cache  # the predictors follow the cache: a forecast is corrected like an output
    seeds = range(OUTPUT_CORRECTION_SEED, OUTPUT_CORRECTION_SEED + count)
    predictor, reference_predictor = (
        _batched_predictor(n, spec, count, batch, conditions) for n in (network, reference)
    )
    sums: dict[float, np.ndarray] = {}
    fits: dict[float, OutputCorrection] = {}
    evaluations = itertools.count(1)
    with progress("output correction", solver_evaluations(plan.solver, plan.steps)) as advance:

        def predict(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
            out_q = predictor(x, level)
            # a timestep that is evaluated twice (by plms, for example) has one correction for both
            sums[level.t] = sums.get(level.t, 0.0) + moments(reference_predictor(x, level), out_q)
            fits[level.t] = fit_correction(sums[level.t], level.t)
            advance(next(evaluations))
            return out_q

        # the denoiser immediately applies the correction that `predict` has just measured
        denoise = denoiser_from_predictor(
            predict, spec, clip=plan.clip, output_corrections=fits, threshold=plan.threshold
        )
        noise = noise_for(seeds, spec.sample_shape)
        for _ in sample(denoise, noise, spec.schedule, plan, lambda k: noise_for(seeds, spec.sample_shape, stream=k)):
            pass
    return tuple(fits[t] for t in plan.timesteps)


def moments(out: np.ndarray, out_q: np.ndarray) -> np.ndarray:
    """Sum 1, out, out_q, out_q^2 and out out_q over samples and pixels of outputs [N, C, ...]; float64 [5, C]."""
    x, y = (array.astype(np.float64) for array in (out, out_q))
    summed = (0, *range(2, x.ndim))
    return np.stack([a.sum(summed) for a in (np.ones_like(x), x, y, y * y, x * y)])


def fit_correction(sums: np.ndarray, t: float) -> OutputCorrection:
    """Fit the correction to these `moments` by least squares: out = gain out_q + offset, gain = 1 / (1 + slope).

    The slope is limited to MAX_SLOPE, and the biases are those of the limited slope.
    """
    n, x, y, yy, xy = sums
    variance, covariance = float((yy - y * y / n).sum()), float((xy - x * y / n).sum())
    if not (covariance > 0.0 and np.isfinite(covariance)):
        raise InvalidInputError(
            f"quantize: at timestep {t:g} the quantized network's output does not correlate with the float network's; "
            "keep sensitive layers in float (ignored_layers: [...]), or set output_correction: false"
        )
    slope = float(np.clip(variance / covariance, 1.0 - MAX_SLOPE, 1.0 + MAX_SLOPE))
    return OutputCorrection(slope - 1.0, tuple(((y - slope * x) / n).tolist()))


def _batched_predictor(
    network: Network, spec: DenoiserSpec, count: int, batch: int, conditions: ConditioningInputs
) -> Predict:
    """Return a predictor of the network's guided output for all samples, evaluating `batch` at a time."""
    parts = [slice(start, start + batch) for start in range(0, count, batch)]
    predictors = [plan_predictor(network, spec, conditions.part(part)) for part in parts]
    return lambda x, level: np.concatenate(
        [predictor(x[part], level) for predictor, part in zip(predictors, parts, strict=True)]
    )
