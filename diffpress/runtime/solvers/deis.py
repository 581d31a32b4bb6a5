"""DEIS, the exponential integrator that extrapolates eps as a polynomial in log r (Zhang & Chen 2023, tAB-DEIS).

With X = x / alpha, dX/dr = eps:   X' = X + sum_i c_i eps_i,   c_i = integral over r..r' of L_i(log r) dr

where L_i are the Lagrange polynomials of the last `order` places. With r = e^u the integral of a polynomial p is
e^u (p - p' + p'' - ...), exactly. As the c_i add up to r' - r, which is the plain step, what is left to add to the
transfer is alpha' sum_i c_i (eps_i - eps) over the past. First order is DDIM.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.polynomial import Polynomial

from diffpress.runtime.solvers.contract import StepState, final_order, half_log_snr, is_all_noise, noise_in, transfer


def deis(order: int, step: StepState) -> np.ndarray:
    """Of that order where the past reaches so far; the step to a clean sample is of first order."""
    plain = transfer(step.x, step.x0, step.now, step.next)
    history = [before for before in reversed(step.history) if not is_all_noise(before.level)]
    history = history[: final_order(step, order) - 1]
    if not history or step.next.sigma == 0.0 or step.now.sigma == 0.0:
        return plain
    places = [half_log_snr(step.now) - half_log_snr(before.level) for before in history]  # u = log r - log r_now
    if min(np.diff([0.0, *places])) <= 0.0:
        return plain
    eps, end = noise_in(step.x, step.x0, step.now), half_log_snr(step.now) - half_log_snr(step.next)
    ratio = step.now.sigma / step.now.alpha
    for k, before in enumerate(history):
        others = [0.0, *places[:k], *places[k + 1 :]]
        weight = ratio * _integral(Polynomial.fromroots(others), end) / math.prod(places[k] - u for u in others)
        plain = plain + step.next.alpha * weight * (noise_in(before.x, before.x0, before.level) - eps)
    return plain


def _integral(p: Polynomial, end: float) -> float:
    """The integral of p(u) e^u over u from 0 to `end`."""
    inner = sum((p.deriv(k) * (-1) ** k for k in range(1, p.degree() + 1)), start=p)
    return float(math.exp(end) * inner(end) - inner(0.0))
