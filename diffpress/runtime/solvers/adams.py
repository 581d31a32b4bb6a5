"""Adams-Bashforth with the fixed coefficients of equal steps, up to fourth order, one evaluation per step.

ipndm     On dX/dr = eps with X = x / alpha (Zhang & Chen 2023). Replacing eps by eps + d adds (sigma' - alpha' r) d to
          the transfer. The order rises over the first steps; the last step is first-order and ends at x_0 itself.
plms      On eps, as in the pseudo multi-step method (Liu et al. 2022, PNDM, eq. 9 and 12): x_0 is computed from the
          mixed eps, in the last step too. The first step is improved Euler, which takes one more evaluation.
plms_v    The same on v instead of eps, as diffusers' PNDMScheduler does for models that predict v. Because v rotates
          along the trajectory, which eps does not, it is only first-order; `plms` is better for these models as well.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.parameterization import noise_in, transfer
from diffpress.runtime.solvers.contract import PreviousStep, StepState, is_pure_noise
from diffpress.runtime.solvers.mixing import improved_euler, mixed_transfer

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(step: StepState) -> np.ndarray:
    """Adams-Bashforth up to fourth order on eps; first-order in the last step."""
    now, next = step.now, step.next
    plain = transfer(step.x, step.x0, now, next)
    history = [before for before in step.history if before.level.alpha > 0]
    if not history or next.sigma == 0.0 or now.sigma == 0.0:
        return plain
    first, *rest = ADAMS_BASHFORTH[len(history)]
    change = (first - 1.0) * noise_in(step.x, step.x0, now)
    for weight, before in zip(rest, reversed(history), strict=True):
        change += weight * noise_in(before.x, before.x0, before.level)
    return plain + (next.sigma - next.alpha * now.sigma / now.alpha) * change


def plms(prediction: str, step: StepState) -> np.ndarray:
    """Adams-Bashforth up to fourth order on the output of a network with this prediction type."""
    if not step.history and not step.is_last:
        return improved_euler(prediction, step)
    history = [before for before in reversed(step.history) if not is_pure_noise(before.level)]
    if not history or step.now.sigma == 0.0:
        return transfer(step.x, step.x0, step.now, step.next)
    states = [PreviousStep(step.now, step.x, step.x0), *history]
    return mixed_transfer(prediction, states, ADAMS_BASHFORTH[len(history)], step.next)


def plms_evaluations(steps: int) -> int:
    """Return the evaluations of `plms`: one per step and one more in the first of several steps."""
    return steps + 1 if steps > 1 else steps
