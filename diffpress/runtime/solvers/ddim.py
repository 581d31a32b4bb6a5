"""First-order solvers: one evaluation per step, with x_0 unchanged.

ddim            Keeps part of eps and adds eta's share of fresh noise (Song et al. 2021, eq. 12 and 16).
ddim_clip       The same, with x_0 clipped to -1..1 but eps computed from the unclipped x_0: diffusers' `clip_sample`.
                (A plan's own `clip` clips x_0 before eps is computed.)
euler           With X = x / alpha the ODE is dX/dr = (X - x_0) / r (Karras et al. 2022, eq. 1), and one step is
                    X' = X + (r' - r) (X - x_0) / r = x_0 + (r' / r) (X - x_0)
                Multiplied by alpha' this is `transfer`: in exact arithmetic Euler is DDIM with eta = 0 for every
                prediction type, as they differ only in how x_0 is computed (a flow's x + (s' - s) u is the same).
ancestral       DDIM with eta = 1, which is both DDPM with the smaller variance (`fixed_small`) and Euler ancestral.
ddpm_large      DDPM with the larger of the two variances in Ho et al. 2020 (section 3.2): beta, not the posterior's.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.parameterization import transfer
from diffpress.runtime.solvers.contract import StepState, noisy_transfer, removed_variance, split_noise


def ddim(step: StepState) -> np.ndarray:
    """DDIM: deterministic with eta = 0, the posterior of DDPM with eta = 1."""
    return noisy_transfer(step, step.x0, step.eta)


def ddim_clip(step: StepState) -> np.ndarray:
    """DDIM with clipped x_0 and unclipped eps, for plans that do not clip themselves."""
    return ddim(step) + step.next.alpha * (np.clip(step.x0, -1.0, 1.0) - step.x0)


def euler(step: StepState) -> np.ndarray:
    """Euler's method on the probability flow ODE: the same step as deterministic DDIM (see above)."""
    return transfer(step.x, step.x0, step.now, step.next)


def ancestral(step: StepState) -> np.ndarray:
    """DDIM with eta = 1, regardless of the plan's eta."""
    return noisy_transfer(step, step.x0, 1.0)


def ddpm_large(step: StepState) -> np.ndarray:
    """DDPM's posterior mean plus noise of variance beta; no noise in a step that ends at a clean sample."""
    goal, fresh = split_noise(step.now, step.next, 1.0)
    moved = transfer(step.x, step.x0, step.now, goal)
    return moved + math.sqrt(removed_variance(step.now, step.next)) * step.noise(0) if fresh > 0 else moved
