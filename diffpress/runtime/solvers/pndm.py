"""The pseudo-numerical method with its Runge-Kutta start (Liu et al. 2022, PNDM, eq. 13), as in diffusers.

The first three steps are pseudo Runge-Kutta steps of four evaluations: at the start, twice in the middle and at the
end, weighted 1/6, 1/3, 1/3, 1/6. The others are those of `plms` (adams.py), of fourth order from the start. diffusers
halves the stride T // N, rounded down: for an odd stride the first middle sample is one timestep noisier than the
timestep that the network gets, and so it is here.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel, noise_level_at
from diffpress.runtime.solvers.adams import plms
from diffpress.runtime.solvers.contract import PreviousStep, StepState
from diffpress.runtime.solvers.mixing import mixed_transfer

RUNGE_KUTTA_STEPS = 3


def pndm(prediction: str, step: StepState) -> np.ndarray:
    """Take a Runge-Kutta step at the start, and a multistep after it."""
    if step.steps <= RUNGE_KUTTA_STEPS:
        raise InvalidInputError(f"{step.steps} steps: solver pndm starts with three Runge-Kutta steps, use at least 4")
    if len(step.history) >= RUNGE_KUTTA_STEPS:
        return plms(prediction, step)
    start, half = PreviousStep(step.now, step.x, step.x0), int(step.now.t - step.next.t) // 2
    middle = noise_level_at(step.schedule, step.next.t + half)

    def evaluate(state: PreviousStep, level: NoiseLevel, network_level: NoiseLevel) -> PreviousStep:
        moved = mixed_transfer(prediction, [start, state], (0.0, 1.0), level)
        return PreviousStep(network_level, moved, step.denoise(moved, network_level))

    second = evaluate(start, noise_level_at(step.schedule, step.now.t - half), middle)
    third = evaluate(second, middle, middle)
    fourth = evaluate(third, step.next, step.next)
    return mixed_transfer(prediction, [start, second, third, fourth], (1 / 6, 1 / 3, 1 / 3, 1 / 6), step.next)


def pndm_evaluations(steps: int) -> int:
    """Return the evaluations of `pndm`: four in each of the first three steps, and one in the others."""
    return steps + 3 * min(steps, RUNGE_KUTTA_STEPS)
