"""Multistep sampling of models that jump to a clean sample: x' = alpha' D + sigma' z, noise fresh at every step.

lcm           D is a consistency function made of x_0 (Luo et al. 2023, latent consistency models):
                  D = c_skip x + c_out x_0,   c_skip = s^2 / (u^2 + s^2),   c_out = u / sqrt(u^2 + s^2)
              with u = 10 t and s = 0.5.
consistency   D is x_0 itself (Song et al. 2023, algorithm 1): students whose network was taught to be right about it.

The last step lands on D.
"""

from __future__ import annotations

import math

import numpy as np

from diffpress.runtime.solvers.contract import StepState

LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5  # diffusers' `timestep_scaling` and `sigma_data`


def lcm(step: StepState) -> np.ndarray:
    u = LCM_TIME_SCALE * step.now.t
    length = math.hypot(u, LCM_SIGMA_DATA)
    return _noised((LCM_SIGMA_DATA / length) ** 2 * step.x + u / length * step.x0, step)


def consistency(step: StepState) -> np.ndarray:
    return _noised(step.x0, step)


def _noised(clean: np.ndarray, step: StepState) -> np.ndarray:
    if step.next.sigma == 0.0:
        return clean
    return step.next.alpha * clean + step.next.sigma * step.noise(0)
