"""Multistep sampling of consistency models: x' = alpha' D + sigma' z, with fresh noise z in every step.

lcm           D is a consistency function of x and x_0 (Luo et al. 2023, latent consistency models):
                  D = c_skip x + c_out x_0,   c_skip = s^2 / (u^2 + s^2),   c_out = u / sqrt(u^2 + s^2)
              with u = 10 t and s = 0.5.
consistency   D is x_0 itself (Song et al. 2023, algorithm 1), for students trained to predict the clean sample.

The last step ends at D.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.solvers.contract import StepState

LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5  # diffusers' `timestep_scaling` and `sigma_data`


def lcm(step: StepState) -> np.ndarray:
    """Take a step of a latent consistency model."""
    u = LCM_TIME_SCALE * step.now.t
    length = math.hypot(u, LCM_SIGMA_DATA)
    return _noised((LCM_SIGMA_DATA / length) ** 2 * step.x + u / length * step.x0, step)


def consistency(step: StepState) -> np.ndarray:
    """Add fresh noise to x_0."""
    return _noised(step.x0, step)


def _noised(clean: np.ndarray, step: StepState) -> np.ndarray:
    if step.next.sigma == 0.0:
        return clean
    return step.next.alpha * clean + step.next.sigma * step.noise(0)
