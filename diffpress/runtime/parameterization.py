"""What a network predicts, and x_0 from it."""

from __future__ import annotations

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel


def to_x0(prediction: str, x: np.ndarray, out: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """x_0 from what the network returned at x (see above); raises InvalidInputError for epsilon at pure noise."""
    alpha, sigma = level.alpha, level.sigma
    if prediction == "sample":
        return out
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if alpha == 0.0:
        raise InvalidInputError(
            f"timestep {level.t:g} is pure noise (alpha 0), where an epsilon prediction says nothing about "
            "the image; start the plan at an earlier timestep"
        )
    return (x - sigma * out) / alpha
