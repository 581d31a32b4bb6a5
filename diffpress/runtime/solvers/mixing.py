"""x_0 computed from a weighted sum of network outputs at several noise levels.

Linear multistep and Runge-Kutta methods mix derivatives. The mixed quantity determines which ODE they solve: eps is the
derivative in r, a flow's eps - x_0 the one in s. The step is the transfer with the x_0 of the mixed output.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import noise_in, to_output, to_x0, transfer
from diffpress.runtime.solvers.contract import PreviousStep, StepState, is_pure_noise


def mixed_transfer(
    prediction: str, states: Sequence[PreviousStep], weights: Sequence[float], next: NoiseLevel
) -> np.ndarray:
    """Return the transfer from the first of `states`, with x_0 from the weighted sum of the outputs at all of them."""
    now, x, _ = states[0]
    out = sum(w * _output(prediction, *state) for w, state in zip(weights, states, strict=False))
    return transfer(x, to_x0(prediction, x, np.asarray(out), now), now, next)


def improved_euler(prediction: str, step: StepState) -> np.ndarray:
    """Step with the mean of the outputs at both ends, the far end predicted by a plain step: two evaluations."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    ahead = PreviousStep(step.next, plain, step.denoise(plain, step.next))
    undefined = prediction == "epsilon" and is_pure_noise(step.now)
    if undefined or step.now.sigma == 0.0 or step.next.sigma == 0.0:  # one end has no meaningful derivative
        return plain
    return mixed_transfer(prediction, [PreviousStep(step.now, step.x, step.x0), ahead], (1 / 2, 1 / 2), step.next)


def _output(prediction: str, level: NoiseLevel, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """The output of a network with this prediction type (epsilon, v or flow) that corresponds to x_0."""
    return to_output(prediction, x0, noise_in(x, x0, level), level)
