"""First-order solvers: one call a step, and x_0 as it is.

ddim            keeps part of eps and adds eta's share of fresh noise (Song et al. 2021, eq. 12 and 16).
ddim_clip       The same with x_0 bounded to -1..1 where it is added and eps left as it was: diffusers' `clip_sample`.
                (A plan's own `clip` bounds x_0 before eps is read off it.)
euler           With X = x / alpha the ODE is dX/dr = (X - x_0) / r (Karras et al. 2022, eq. 1), and one step is
                    X' = X + (r' - r) (X - x_0) / r = x_0 + (r' / r) (X - x_0)
                Times alpha' this is `transfer`: in exact arithmetic Euler is DDIM with eta = 0 for every
                prediction, since they differ only in how x_0 is read off (a flow's x + (s' - s) u is this too).
ancestral       DDIM with eta = 1: what DDPM with its smaller variance (`fixed_small`) and Euler ancestral both are.
ddpm_large      DDPM with the larger of the two variances in Ho et al. 2020 (section 3.2), beta for the posterior's.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.solvers.contract import StepState, noisy_transfer, removed_variance, split_noise, transfer


def ddim(step: StepState) -> np.ndarray:
    """Deterministic at eta = 0, the posterior of DDPM at eta = 1."""
    return noisy_transfer(step, step.x0, step.eta)


def ddim_clip(step: StepState) -> np.ndarray:
    """DDIM that bounds x_0 and not the eps read off with it; for plans that do not clip by themselves."""
    return ddim(step) + step.next.alpha * (np.clip(step.x0, -1.0, 1.0) - step.x0)


def euler(step: StepState) -> np.ndarray:
    """Euler's method on the probability-flow ODE: the same step as deterministic DDIM (see above)."""
    return transfer(step.x, step.x0, step.now, step.next)


def ancestral(step: StepState) -> np.ndarray:
    """DDIM with all of its noise, whatever the plan's eta."""
    return noisy_transfer(step, step.x0, 1.0)


def ddpm_large(step: StepState) -> np.ndarray:
    """The mean of DDPM's posterior, and noise of variance beta; none in a step that ends at a clean sample."""
    goal, fresh = split_noise(step.now, step.next, 1.0)
    moved = transfer(step.x, step.x0, step.now, goal)
    return moved + math.sqrt(removed_variance(step.now, step.next)) * step.noise(0) if fresh > 0 else moved
