"""Heun's method, the trapezoidal rule: second order with two calls a step (Karras et al. 2022, algorithm 1).

heun        on dX/dr = eps, X = x / alpha: for models on variance-preserving schedules. A step from pure noise, where
            r is infinite, stays of first order.
heun_flow   on dx/ds = eps - x_0: for flow matching, as diffusers' FlowMatchHeunDiscreteScheduler.

The last step is of first order: at a clean sample no derivative is left to be read off. N steps are 2 N - 1 calls.
"""

from __future__ import annotations

import numpy as np

from diffpress.runtime.solvers.contract import StepState, transfer
from diffpress.runtime.solvers.mixing import improved_euler


def heun(prediction: str, step: StepState) -> np.ndarray:
    """Improved Euler on what a network of that prediction returns, in every step but the last."""
    if step.is_last:
        return transfer(step.x, step.x0, step.now, step.next)
    return improved_euler(prediction, step)
