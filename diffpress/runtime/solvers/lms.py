"""Linear multistep with exact coefficients, up to fourth order, one evaluation per step (Katherine Crowson's LMS).

With X = x / alpha, dX/dr = eps:   X' = X + sum_i c_i eps_i,   c_i = integral over r..r' of L_i(r) dr

where L_i are the Lagrange polynomials of the last four noise levels; the order rises over the first steps. DEIS
(deis.py) does the same with polynomials in log r. The c_i sum to r' - r, the first-order step, so only
alpha' sum_i c_i (eps_i - eps) over the earlier steps is added to the transfer.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from diffpress.runtime.parameterization import noise_in, transfer
from diffpress.runtime.solvers.contract import StepState


def lms(step: StepState) -> np.ndarray:
    """Take a step of the highest order that the history allows."""
    moved = transfer(step.x, step.x0, step.now, step.next)
    history = [before for before in reversed(step.history) if before.level.alpha > 0]
    if step.now.alpha == 0.0 or step.now.sigma == 0.0:
        return moved
    ratio = step.now.sigma / step.now.alpha
    nodes = [before.level.sigma / before.level.alpha - ratio for before in history]
    eps, end = noise_in(step.x, step.x0, step.now), step.next.sigma / step.next.alpha - ratio
    for k, before in enumerate(history):
        others = [0.0, *nodes[:k], *nodes[k + 1 :]]
        weight = float(Polynomial.fromroots(others).integ()(end)) / math.prod(nodes[k] - u for u in others)
        moved = moved + step.next.alpha * weight * (noise_in(before.x, before.x0, before.level) - eps)
    return moved
