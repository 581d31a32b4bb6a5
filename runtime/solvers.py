"""Solvers: pure functions that carry a noisy sample from one point to the next, cleaner one.

Writing x = alpha x_0 + sigma eps for the network's guess x_0 at hand, and primes for the next point, every
solver here is the same move along the line that x_0 defines (Song et al. 2021, eq. 12 without fresh noise),

    transfer(x, x_0) = alpha' x_0 + (sigma' / sigma) (x - alpha x_0)

with another guess put in, or with noise added. With r = sigma / alpha and lambda = -log r:

ddim      keeps only part of eps and adds c of fresh noise,
              c = eta (sigma' / sigma) sqrt(sigma^2 - (alpha sigma' / alpha')^2)
          which for alpha^2 + sigma^2 = 1 is eq. 16 of the paper.
ddim_clip The same with x_0 bounded to -1..1 where it is added and eps left as it was: diffusers' `clip_sample`.
          (A plan's own `clip` bounds x_0 before eps is read off it.)
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
plms      Adams-Bashforth on eps as the pseudo multi-step method has it (Liu et al. 2022, PNDM, eq. 9 and 12): x_0 is
          read off the mixed eps, in the last step too. Its first step is taken twice (`WARM_UP`), which costs one
          more call of the network: to x' with eps, and again from x with (eps + eps') / 2, eps' the one seen at x'.
plms_v    The same with v in the place of eps, as diffusers' PNDMScheduler does for models that predict v. Since v
          turns along the way, which eps does not, this is of first order only: `plms` is better for them too.
lcm       A consistency function made of x_0 (Luo et al. 2023), and fresh noise on top of it:
              x' = alpha' D + sigma' z,   D = c_skip x + c_out x_0,   u = 10 t
              c_skip = s^2 / (u^2 + s^2),   c_out = u / sqrt(u^2 + s^2),   s = 0.5
          The last step lands on D itself.

Nothing is divided by an alpha that may be zero: pure noise (alpha = 0) is a fine start.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import numpy as np

from runtime.denoise import to_x0
from runtime.errors import unknown_name
from runtime.schedule import LOG_RATIO_MAX, Point
from runtime.spec import Plan


class Past(NamedTuple):
    """An earlier step: where it was, the sample there and the network's x_0."""

    point: Point
    x: np.ndarray
    x0: np.ndarray


# solver(x, x0, now, next, earlier steps (latest last), fresh unit noise shaped like x, eta) -> next x
Solver = Callable[[np.ndarray, np.ndarray, Point, Point, Sequence[Past], Callable[[], np.ndarray], float], np.ndarray]
# warm_up(x, x0, now, next, what is seen where the solver's own first step ends) -> next x
WarmUp = Callable[[np.ndarray, np.ndarray, Point, Point, Past], np.ndarray]

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
CLIPPING = "ddim_clip"  # the one solver that bounds x_0 itself
LCM_TIME_SCALE, LCM_SIGMA_DATA = 10.0, 0.5  # diffusers' `timestep_scaling` and `sigma_data`
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


def ddim_clip(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """DDIM that bounds x_0 and not the eps read off with it; for plans that do not clip by themselves."""
    return ddim(x, x0, now, next, history, noise, eta) + next.alpha * (np.clip(x0, -1.0, 1.0) - x0)


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


def _plms(
    prediction: str,
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """Adams-Bashforth up to fourth order on what a network of that prediction returns."""
    past = [before for before in reversed(history) if not _is_all_noise(before.point)]
    if not past or now.sigma == 0.0:
        return transfer(x, x0, now, next)
    return _mixed_transfer(prediction, [Past(now, x, x0), *past], ADAMS_BASHFORTH[min(len(past), MEMORY)], next)


def _improved_euler(prediction: str, x: np.ndarray, x0: np.ndarray, now: Point, next: Point, ahead: Past) -> np.ndarray:
    """A first step with the mean of the outputs at both its ends: second order where multi-step has no past yet."""
    if _is_all_noise(now) or ahead.point.sigma == 0.0:  # at one end or the other no output can be read off
        return transfer(x, x0, now, next)
    return _mixed_transfer(prediction, [Past(now, x, x0), ahead], (1 / 2, 1 / 2), next)


def lcm(
    x: np.ndarray,
    x0: np.ndarray,
    now: Point,
    next: Point,
    history: Sequence[Past],
    noise: Callable[[], np.ndarray],
    eta: float,
) -> np.ndarray:
    """Multistep sampling of a latent consistency model: to a clean sample, and back to the next noise level."""
    u = LCM_TIME_SCALE * now.t
    length = math.hypot(u, LCM_SIGMA_DATA)
    clean = (LCM_SIGMA_DATA / length) ** 2 * x + u / length * x0
    return clean if next.sigma == 0.0 else next.alpha * clean + next.sigma * noise()


SOLVERS: dict[str, Solver] = {
    "ddim": ddim,
    CLIPPING: ddim_clip,
    "euler": euler,
    "dpmpp_2m": dpmpp_2m,
    "ipndm": ipndm,
    "plms": partial(_plms, "epsilon"),
    "plms_v": partial(_plms, "v"),
    "lcm": lcm,
}

# solvers whose first step, where others follow, is taken again after one more look at the network
WARM_UP: dict[str, WarmUp] = {"plms": partial(_improved_euler, "epsilon"), "plms_v": partial(_improved_euler, "v")}


def solver_named(name: str) -> Solver:
    """The solver of that name; raises BadInput naming the nearest match."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def with_solver(plan: Plan, name: str) -> Plan:
    """The plan walked by another solver; raises BadInput for an unknown one.

    Where to end belongs to the solver the checkpoint came with, corrections to the one they were measured with. The
    plan bounds x_0, or its solver does: never both.
    """
    solver_named(name)
    if name == plan.solver:
        return plan
    clip = (plan.clip or plan.solver == CLIPPING) and name != CLIPPING
    return replace(plan, solver=name, end=None, clip=clip, corrections=())


def network_calls(solver: str, steps: int) -> int:
    """How often that solver asks the network on a plan of so many steps: once a step, and once more to warm up."""
    return steps + 1 if solver in WARM_UP and steps > 1 else steps


def _mixed_transfer(prediction: str, seen: Sequence[Past], weights: Sequence[float], next: Point) -> np.ndarray:
    """The transfer from the first of `seen`, with x_0 read off the weighted sum of the outputs at all of them."""
    now, x, _ = seen[0]
    out = sum(w * _output(prediction, *place) for w, place in zip(weights, seen, strict=False))
    return transfer(x, to_x0(prediction, x, np.asarray(out), now), now, next)


def _output(prediction: str, point: Point, x: np.ndarray, x0: np.ndarray) -> np.ndarray:
    """What a network of that prediction, epsilon or v, returned where x_0 is its guess."""
    eps = _noise_in(x, x0, point)
    return eps if prediction == "epsilon" else point.alpha * eps - point.sigma * x0


def _half_log_snr(point: Point) -> float:
    """lambda = log(alpha / sigma), minus infinity at pure noise and plus infinity at a clean sample."""
    if point.sigma == 0.0:
        return math.inf
    return math.log(point.alpha / point.sigma) if point.alpha > 0 else -math.inf


def _is_all_noise(point: Point) -> bool:
    """Whether r is infinite or so high that no slope in r means anything: the end of a cosine table."""
    return point.sigma > math.exp(LOG_RATIO_MAX) * point.alpha


def _noise_in(x: np.ndarray, x0: np.ndarray, point: Point) -> np.ndarray:
    """eps = (x - alpha x_0) / sigma."""
    return (x - point.alpha * x0) / point.sigma
