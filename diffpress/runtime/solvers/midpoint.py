"""The midpoint rule in log r: second order, two evaluations per step (DPM-Solver-2, Karras et al. 2022, algorithm 2).

With X = x / alpha, dX/dr = eps, the step uses eps at r_m = sqrt(r r'), reached with a first-order step:

    X' = X + (r' - r) eps_m

The last step to a clean sample is first-order. N steps take 2 N - 1 evaluations.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.noise_schedule import noise_level_of_ratio
from diffpress.runtime.parameterization import noise_in, transfer
from diffpress.runtime.sigma_spacing import log_timesteps, table_ratios
from diffpress.runtime.solvers.contract import StepState


def kdpm2(step: StepState) -> np.ndarray:
    """Take a midpoint step; the timestep in the middle is interpolated in log r, as in diffusers."""
    now, next = step.now, step.next
    if next.sigma == 0.0 or now.sigma == 0.0 or now.alpha == 0.0:
        return transfer(step.x, step.x0, now, next)
    ratio, ratio_next = now.sigma / now.alpha, next.sigma / next.alpha
    between = math.sqrt(ratio * ratio_next)
    t = float(log_timesteps(np.array([between]), table_ratios(step.schedule))[0])
    middle = noise_level_of_ratio(step.schedule, t, between)
    moved = transfer(step.x, step.x0, now, middle)
    eps = noise_in(moved, step.denoise(moved, middle), middle)
    return next.alpha * (step.x / now.alpha + (ratio_next - ratio) * eps)
