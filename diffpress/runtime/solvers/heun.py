"""Heun's method, the trapezoidal rule: second order, two evaluations per step (Karras et al. 2022, algorithm 1).

heun        On dX/dr = eps with X = x / alpha, for variance-preserving schedules. A step from pure noise, where r is
            infinite, is first-order.
heun_flow   On dx/ds = eps - x_0, for flow matching, as in diffusers' FlowMatchHeunDiscreteScheduler.

The last step is first-order, because a clean sample has no derivative. N steps take 2 N - 1 evaluations.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.parameterization import transfer
from diffpress.runtime.solvers.contract import StepState
from diffpress.runtime.solvers.mixing import improved_euler


def heun(prediction: str, step: StepState) -> np.ndarray:
    """Improved Euler on the output of a network with this prediction type, in every step but the last."""
    if step.is_last:
        return transfer(step.x, step.x0, step.now, step.next)
    return improved_euler(prediction, step)
