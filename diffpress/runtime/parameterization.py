"""Prediction types: x_0 computed from what the network returns.

With x = alpha x_0 + sigma eps, x_0 is linear in x and the output `out` for each of them (float32 throughout):

    epsilon   x_0 = (x - sigma out) / alpha
    v         x_0 = (alpha x - sigma out) / (alpha^2 + sigma^2)        from out = alpha eps - sigma x_0
    sample    x_0 = out
    flow      x_0 = (x - sigma out) / (alpha + sigma)                  from out = eps - x_0
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel


def to_x0(prediction: str, x: np.ndarray, out: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """Return x_0 for the network's output `out` at x.

    Raises:
        InvalidInputError: An epsilon prediction at pure noise (alpha = 0), which does not determine x_0.
    """
    alpha, sigma = level.alpha, level.sigma
    if prediction == "sample":
        return out
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if alpha == 0.0:
        raise InvalidInputError(
            f"timestep {level.t:g} is pure noise (alpha 0), where an epsilon prediction does not determine the "
            "image; start the plan at an earlier timestep"
        )
    return (x - sigma * out) / alpha
