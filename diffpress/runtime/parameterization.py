"""What a network predicts, and x_0 from it."""

from __future__ import annotations

import numpy as np

from diffpress.runtime.errors import BadInput
from diffpress.runtime.noise_schedule import Point


def to_x0(prediction: str, x: np.ndarray, out: np.ndarray, point: Point) -> np.ndarray:
    """x_0 from what the network returned at x (see above); raises BadInput for epsilon at pure noise."""
    alpha, sigma = point.alpha, point.sigma
    if prediction == "sample":
        return out
    if prediction == "v":
        return (alpha * x - sigma * out) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * out) / (alpha + sigma)
    if alpha == 0.0:
        raise BadInput(
            f"timestep {point.t:g} is pure noise (alpha 0), where an epsilon prediction says nothing about "
            "the image; start the plan at an earlier timestep"
        )
    return (x - sigma * out) / alpha
