"""DPM-Solver++ (Lu et al. 2022b): an exponential integrator in lambda that extrapolates x_0.

With h = lambda' - lambda a first-order step is x' = (sigma' / sigma) x - alpha' (e^-h - 1) x_0, which is
transfer(x, x_0) because alpha' e^-h = alpha sigma' / sigma. Higher orders estimate derivatives of x_0 in lambda from
earlier steps:

dpmpp_2m       transfer(x, D),  D = x_0 + h D1 / 2,  D1 = (x_0 - x_0_before) / h_before     (algorithm 2, midpoint)
dpmpp_3m       transfer(x, x_0) + alpha' ((e^-h - 1) / h + 1) h D1 - alpha' ((e^-h - 1 + h) / h^2 - 1/2) h^2 D2
               with D1 and D2 the first and second divided differences of three x_0. Third order would need 2 D2;
               the published code and diffusers use D2, and so does this: second order with a smaller error
dpmpp_2m_sde   2m with fresh noise: the same D in the step of the SDE (contract.split_noise)
dpmpp_2m_heun  the same step with another quadrature: transfer(x, x_0) + alpha' ((e^-h - 1) / h + 1) h D1
dpmpp_2s       singlestep: in every second step, second order from the step before, whose sample and x_0 it uses again
dpm_2m         DPM-Solver of second order (Lu et al. 2022a): the same as 2m with eps in the place of x_0
dpmpp_sde      singlestep with two evaluations: to the middle of the step in lambda, then again from x with the x_0
               found there (DPM-Solver++(2S), algorithm 1, on the SDE). Both noises belong to one Brownian motion in r.

The first step is first-order, and so is a step that ends at a clean sample, where h is infinite.
"""

from __future__ import annotations

import math
from functools import partial

import numpy as np

from diffpress.runtime.noise_schedule import noise_level_at_ratio
from diffpress.runtime.parameterization import transfer
from diffpress.runtime.solvers.contract import (
    PreviousStep,
    StepState,
    final_order,
    half_log_snr,
    noisy_transfer,
    split_noise,
)
from diffpress.runtime.solvers.mixing import mixed_transfer

LEAST_ALPHA = 1e-6  # replaces alpha = 0, whose logarithm is infinite


def _dpmpp_2m(eta: float, step: StepState) -> np.ndarray:
    if step.next.sigma == 0.0 or final_order(step, 2) < 2:
        return noisy_transfer(step, step.x0, eta)
    return noisy_transfer(step, _midway(step), eta)


dpmpp_2m = partial(_dpmpp_2m, 0.0)
dpmpp_2m_sde = partial(_dpmpp_2m, 1.0)


def dpmpp_2m_heun(step: StepState) -> np.ndarray:
    """DPM-Solver++(2M) with the slope integrated exactly: diffusers' solver_type 'heun'."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    if step.next.sigma == 0.0 or final_order(step, 2) < 2 or not step.history:
        return plain
    h, h_0, _ = _spans(step, step.history[-1], step.history[-1])
    if not (math.isfinite(h_0) and min(h, h_0) > 0.0):
        return plain
    weight = (math.expm1(-h) / h + 1.0) * h / h_0
    return plain + step.next.alpha * weight * (step.x0 - step.history[-1].x0)


def dpm_2m(step: StepState) -> np.ndarray:
    """DPM-Solver(2M): the step with eps extrapolated linearly in lambda."""
    now = PreviousStep(step.now, step.x, step.x0)
    weight = 0.0
    if step.history and step.next.sigma > 0.0 and final_order(step, 2) > 1:
        h, h_0, _ = _spans(step, step.history[-1], step.history[-1])
        weight = h / (2.0 * h_0) if math.isfinite(h_0) and h_0 > 0.0 else 0.0
    if weight == 0.0:
        return transfer(step.x, step.x0, step.now, step.next)
    return mixed_transfer("epsilon", [now, step.history[-1]], (1.0 + weight, -weight), step.next)


def dpmpp_2s(step: StepState) -> np.ndarray:
    """DPM-Solver++(2S) over pairs of steps: the first of each pair, and the last step, are first-order."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    if step.index % 2 == 0 or step.is_last or not step.history:
        return plain
    start = step.history[-1]
    h, h_0 = (half_log_snr(level) - half_log_snr(start.level) for level in (step.next, step.now))
    if not (math.isfinite(h) and 0.0 < h_0 < h):
        return plain
    return transfer(start.x, start.x0 + h / (2.0 * h_0) * (step.x0 - start.x0), start.level, step.next)


def dpmpp_3m(step: StepState) -> np.ndarray:
    """DPM-Solver++(3M): uses three x_0 from the third step on, and dpmpp_2m before."""
    history = [before for before in step.history if math.isfinite(half_log_snr(before.level))]
    if step.next.sigma == 0.0 or final_order(step, 3) < 3 or len(history) < 2 or half_log_snr(step.now) == -math.inf:
        return dpmpp_2m(step)
    plain = transfer(step.x, step.x0, step.now, step.next)
    h, h_0, h_1 = _spans(step, history[-1], history[-2])
    if min(h, h_0, h_1) <= 0.0:
        return plain
    slope, slope_before = (step.x0 - history[-1].x0) / h_0, (history[-1].x0 - history[-2].x0) / h_1
    bend = (slope - slope_before) / (h_0 + h_1)
    first = (math.expm1(-h) / h + 1.0) * h
    second = ((math.expm1(-h) + h) / h**2 - 0.5) * h**2
    return plain + step.next.alpha * (first * (slope + h_0 * bend) - second * bend)


def dpmpp_sde(step: StepState) -> np.ndarray:
    """Second-order SDE step with a second evaluation between two timesteps; the last step is first-order."""
    now, next = step.now, step.next
    if step.is_last or next.sigma == 0.0 or next.alpha == 0.0 or now.sigma == 0.0 or now == next:
        return noisy_transfer(step, step.x0, 1.0)
    high, low = now.sigma / max(now.alpha, LEAST_ALPHA), next.sigma / next.alpha
    middle = noise_level_at_ratio(step.schedule, math.sqrt(high * low))
    half = step._replace(next=middle)
    middle_x0 = step.denoise(noisy_transfer(half, step.x0, 1.0), middle)
    goal, fresh = split_noise(now, next, 1.0)
    ratio = middle.sigma / middle.alpha
    first, rest = (math.sqrt(part / (high - low)) for part in (high - ratio, ratio - low))
    return transfer(step.x, middle_x0, now, goal) + fresh * (first * step.noise(0) + rest * step.noise(1))


def _midway(step: StepState) -> np.ndarray:
    """x_0 extrapolated linearly to the middle of the step; unchanged in the first step."""
    if not step.history:
        return step.x0
    h, h_0, _ = _spans(step, step.history[-1], step.history[-1])
    # pure noise in the first step is infinitely far away in lambda, so it gives no slope
    weight = h / (2.0 * h_0) if math.isfinite(h_0) and h_0 > 0 else 0.0
    return (1.0 + weight) * step.x0 - weight * step.history[-1].x0


def _spans(step: StepState, before: PreviousStep, earlier: PreviousStep) -> tuple[float, float, float]:
    """The increments of lambda in this step and in the two before."""
    lambdas = [half_log_snr(level) for level in (step.next, step.now, before.level, earlier.level)]
    return lambdas[0] - lambdas[1], lambdas[1] - lambdas[2], lambdas[2] - lambdas[3]
