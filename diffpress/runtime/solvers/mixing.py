"""x_0 read off a weighted sum of what the network returned at several places.

Linear multistep and Runge-Kutta methods mix derivatives. Which quantity is mixed decides the ODE that they are of:
eps is the derivative in r, a flow's eps - x_0 that in s. The step is then the transfer by the x_0 of the mixture.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.solvers.contract import PreviousStep, StepState, is_all_noise, noise_in, transfer


def mixed_transfer(
    prediction: str, seen: Sequence[PreviousStep], weights: Sequence[float], next: NoiseLevel
) -> np.ndarray:
    """The transfer from the first of `seen`, with x_0 read off the weighted sum of the outputs at all of them."""
    now, x, _ = seen[0]
    out = sum(w * _output(prediction, *place) for w, place in zip(weights, seen, strict=False))
    return transfer(x, to_x0(prediction, x, np.asarray(out), now), now, next)


def improved_euler(prediction: str, step: StepState) -> np.ndarray:
    """A step with the mean of the outputs at both its ends, the far one as a plain step finds it: two calls."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    ahead = PreviousStep(step.next, plain, step.denoise(plain, step.next))
    blind = prediction == "epsilon" and is_all_noise(step.now)
    if blind or step.now.sigma == 0.0 or step.next.sigma == 0.0:  # no output can be read off at one end or the other
        return plain
    return mixed_transfer(prediction, [PreviousStep(step.now, step.x, step.x0), ahead], (1 / 2, 1 / 2), step.next)


def _output(prediction: str, level: NoiseLevel, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """What a network of that prediction (epsilon, v or flow) returned where x_0 is its guess."""
    eps = noise_in(x, x0, level)
    if prediction == "epsilon":
        return eps
    return eps - x0 if prediction == "flow" else level.alpha * eps - level.sigma * x0
