"""DEIS, the exponential integrator that extrapolates eps as a polynomial in log r (Zhang & Chen 2023, tAB-DEIS).

With X = x / alpha, dX/dr = eps:   X' = X + sum_i c_i eps_i,   c_i = integral over r..r' of L_i(log r) dr

where L_i are the Lagrange polynomials of the last `order` noise levels. With r = e^u the integral of a polynomial p is
exactly e^u (p - p' + p'' - ...). The c_i sum to r' - r, which is the first-order step, so only
alpha' sum_i c_i (eps_i - eps) over the earlier steps is added to the transfer. First order is DDIM.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from diffpress.runtime.parameterization import noise_in, transfer
from diffpress.runtime.solvers.contract import StepState, final_order, half_log_snr, is_pure_noise


def deis(order: int, step: StepState) -> np.ndarray:
    """DEIS of this order, or lower with too few earlier steps; the step to a clean sample is first-order."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    history = [before for before in reversed(step.history) if not is_pure_noise(before.level)]
    history = history[: final_order(step, order) - 1]
    if not history or step.next.sigma == 0.0 or step.now.sigma == 0.0:
        return plain
    nodes = [half_log_snr(step.now) - half_log_snr(before.level) for before in history]  # u = log r - log r_now
    if min(np.diff([0.0, *nodes])) <= 0.0:
        return plain
    eps, end = noise_in(step.x, step.x0, step.now), half_log_snr(step.now) - half_log_snr(step.next)
    ratio = step.now.sigma / step.now.alpha
    for k, before in enumerate(history):
        others = [0.0, *nodes[:k], *nodes[k + 1 :]]
        weight = ratio * _integral(Polynomial.fromroots(others), end) / math.prod(nodes[k] - u for u in others)
        plain = plain + step.next.alpha * weight * (noise_in(before.x, before.x0, before.level) - eps)
    return plain


def _integral(p: Polynomial, end: float) -> float:
    """The integral of p(u) e^u over u from 0 to `end`."""
    inner = sum((p.deriv(k) * (-1) ** k for k in range(1, p.degree() + 1)), start=p)
    return float(math.exp(end) * inner(end) - inner(0.0))
