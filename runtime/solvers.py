"""Solvers: pure functions that carry a noisy sample from one point to the next, cleaner one.

Writing x = alpha x_0 + sigma eps for the network's guess x_0 at hand, and primes for the next point, every
solver here is the same move along the line that x_0 defines (Song et al. 2021, eq. 12 without fresh noise),

    transfer(x, x_0) = alpha' x_0 + (sigma' / sigma) (x - alpha x_0)

with another guess put in, or with noise added. With r = sigma / alpha and lambda = -log r:

ddim      keeps only part of eps and adds c of fresh noise,
              c = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2)
          which for alpha^2 + sigma^2 = 1 is eq. 16 of the paper.
euler     With X = x / alpha the ODE is dX/dr = (X - x_0) / r (Karras et al. 2022, eq. 1), and one step is
              X' = X + (r' - r) (X - x_0) / r = x_0 + (r' / r) (X - x_0)
          Times alpha' this is `transfer`: in exact arithmetic Euler is DDIM with eta = 0 for every
          prediction, since they differ only in how x_0 is read off (a flow's x + (s' - s) u is this too).
dpmpp_2m  With h = lambda' - lambda a step is x' = (sigma' / sigma) x - alpha' (e^-h - 1) D (Lu et al. 2022b,
          algorithm 2); alpha' e^-h = alpha sigma' / sigma makes that transfer(x, D), where
              D = x_0 + (x_0 - x_0_before) h / (2 h_before)
          is x_0 extrapolated to the middle of the step. The first step is first order, and so is the last,
          where h is infinite.
ipndm     Adams-Bashforth on dX/dr = eps (Zhang & Chen 2023). Replacing eps by eps + d adds
          (sigma' - alpha' r) d to the transfer. Lower orders warm it up; the last step is first order and
          lands on x_0 itself.

Nothing is divided by an alpha that may be zero: pure noise (alpha = 0) is a fine start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from runtime.errors import unknown_name
from runtime.schedule import Point


class Past(NamedTuple):
    """An earlier step: where it was, the sample there and the network's x_0."""

    point: Point
    x: np.ndarray
    x0: np.ndarray


# solver(x, x0, now, next, earlier steps (latest last), fresh unit noise shaped like x, eta) -> next x
Solver = Callable[[np.ndarray, np.ndarray, Point, Point, Sequence[Past], Callable[[], np.ndarray], float], np.ndarray]

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
MEMORY = len(ADAMS_BASHFORTH) - 1  # how many earlier steps any solver looks back


def transfer(x: np.ndarray, x0: np.ndarray, now: Point, next: Point) -> np.ndarray:
    """alpha' x_0 + (sigma' / sigma)(x - alpha x_0); without noise to begin with, none is left."""
    kept = next.sigma / now.sigma if now.sigma > 0 else 0.0
    return (next.alpha - kept * now.alpha) * x0 + kept * x


def ddim(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """Song et al. 2021: deterministic at eta = 0, the posterior of DDPM at eta = 1."""
    if eta == 0.0 or next.sigma == 0.0 or next.alpha == 0.0 or now.sigma == 0.0:
        return transfer(x, x0, now, next)
    removed = now.sigma**2 - (now.alpha / next.alpha * next.sigma) ** 2
    fresh = eta * next.sigma / now.sigma * math.sqrt(max(removed, 0.0))
    kept = math.sqrt(max(next.sigma**2 - fresh**2, 0.0))
    return transfer(x, x0, now, next._replace(sigma=kept)) + fresh * noise()


def euler(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """Euler's method on the probability-flow ODE: the same step as deterministic DDIM (see above)."""
    return transfer(x, x0, now, next)


def dpmpp_2m(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """DPM-Solver++(2M), midpoint form: second order with one call a step."""
    if not history or next.sigma == 0.0:
        return transfer(x, x0, now, next)
    before = history[-1]
    step, step_before = (
        _half_log_snr(next) - _half_log_snr(now),
        _half_log_snr(now) - _half_log_snr(before.point),
    )
    # a first point of pure noise lies infinitely far back: no slope can be read off it
    weight = step / (2.0 * step_before) if math.isfinite(step_before) and step_before > 0 else 0.0
    return transfer(x, (1.0 + weight) * x0 - weight * before.x0, now, next)


def ipndm(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """Adams-Bashforth up to fourth order on eps, with the fixed coefficients of equal steps."""
    plain = transfer(x, x0, now, next)
    past = [before for before in history if before.point.alpha > 0]
    if not past or next.sigma == 0.0 or now.sigma == 0.0:
        return plain
    first, *rest = ADAMS_BASHFORTH[min(len(past), MEMORY)]
    change = (first - 1.0) * _noise_in(x, x0, now)
    for weight, before in zip(rest, reversed(past), strict=False):
        change += weight * _noise_in(before.x, before.x0, before.point)
    return plain + (next.sigma - next.alpha * now.sigma / now.alpha) * change


SOLVERS: dict[str, Solver] = {"ddim": ddim, "euler": euler, "dpmpp_2m": dpmpp_2m, "ipndm": ipndm}


def solver_named(name: str) -> Solver:
    """The solver of that name; raises BadInput naming the nearest match."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def _half_log_snr(point: Point) -> float:
    """lambda = log(alpha / sigma), minus infinity at pure noise and plus infinity at a clean sample."""
    if point.sigma == 0.0:
        return math.inf
    return math.log(point.alpha / point.sigma) if point.alpha > 0 else -math.inf


def _noise_in(x: np.ndarray, x0: np.ndarray, point: Point) -> np.ndarray:
    """eps = (x - alpha x_0) / sigma."""
    return (x - point.alpha * x0) / point.sigma
