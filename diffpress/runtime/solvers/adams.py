"""Adams-Bashforth with the fixed coefficients of equal steps, up to fourth order, with one call a step.

ipndm     on dX/dr = eps, X = x / alpha (Zhang & Chen 2023). Replacing eps by eps + d adds (sigma' - alpha' r) d to the
          transfer. Lower orders warm it up; the last step is of first order and lands on x_0 itself.
plms      on eps as the pseudo multi-step method has it (Liu et al. 2022, PNDM, eq. 9 and 12): x_0 is read off the
          mixed eps, in the last step too. Its first step is that of improved Euler, which costs one more call.
plms_v    The same with v in the place of eps, as diffusers' PNDMScheduler does for models that predict v. Since v
          turns along the way, which eps does not, this is of first order only: `plms` is better for them too.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.solvers.contract import PreviousStep, StepState, is_all_noise, noise_in, transfer
from diffpress.runtime.solvers.mixing import improved_euler, mixed_transfer

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)


def ipndm(step: StepState) -> np.ndarray:
    """Adams-Bashforth up to fourth order on eps."""
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
    """Adams-Bashforth up to fourth order on what a network of that prediction returns."""
    if step.index == 0 and not step.is_last:
        return improved_euler(prediction, step)
    history = [before for before in reversed(step.history) if not is_all_noise(before.level)]
    if not history or step.now.sigma == 0.0:
        return transfer(step.x, step.x0, step.now, step.next)
    seen = [PreviousStep(step.now, step.x, step.x0), *history]
    return mixed_transfer(prediction, seen, ADAMS_BASHFORTH[len(history)], step.next)


def plms_evaluations(steps: int) -> int:
    return steps + 1 if steps > 1 else steps
