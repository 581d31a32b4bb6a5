"""Noise schedules and timestep grids: how much noise a timestep means, and which timesteps a sampler visits.

A variance-preserving schedule is made from betas:   abar_t = prod_{s<=t} (1 - beta_s),
                                                     alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)
A flow-matching schedule is a straight line:         alpha_t = 1 - s,  sigma_t = s,  s = t / (T - 1)

A trajectory is the timesteps of a grid (runtime/grids.py) and then the clean end, alpha = 1, sigma = 0 (diffusers'
`set_alpha_to_one`, `final_sigmas_type="zero"`), or the point the plan ends at.

Flow models shift their grid, s' = k s / (1 + (k - 1) s) with s = t / T (Esser et al. 2024, section 5.3.2).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime.errors import BadInput, unknown_name
from runtime.grids import timestep_grid, timesteps_at
from runtime.spec import NoiseSchedule, Plan, Spacing

MAX_BETA = 0.999  # what diffusers caps a cosine beta at


class Point(NamedTuple):
    """One place on a trajectory: x_t = alpha * x_0 + sigma * eps, and the timestep the network is told."""

    t: float
    alpha: float
    sigma: float


END = Point(t=0.0, alpha=1.0, sigma=0.0)


def betas_schedule(kind: str, T: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
    """The variance-preserving schedule of T betas of a diffusers `beta_schedule`, in float64.

    `kind` is linear, scaled_linear (linear in sqrt(beta), latent diffusion) or squaredcos_cap_v2 (cosine,
    Nichol and Dhariwal 2021, eq. 17; takes no start and end). Raises BadInput for another kind or a range
    outside (0, 1).
    """
    if kind not in BETAS:
        raise unknown_name("beta schedule", kind, BETAS)
    if T < 2 or not 0.0 < start <= end < 1.0:
        raise BadInput(f"beta schedule: {T} timesteps from {start} to {end}; need at least 2 and 0 < start <= end < 1")
    abar = np.cumprod(1.0 - BETAS[kind](T, start, end))
    return NoiseSchedule(_floats(np.sqrt(abar)), _floats(np.sqrt(1.0 - abar)))


def flow_schedule(T: int = 1000) -> NoiseSchedule:
    """Rectified flow over T timesteps: pure data at t = 0, pure noise at t = T - 1."""
    if T < 2:
        raise BadInput(f"flow schedule: {T} timesteps; need at least 2")
    s = np.arange(T) / (T - 1)
    return NoiseSchedule(_floats(1.0 - s), _floats(s))


def point_at(schedule: NoiseSchedule, t: float) -> Point:
    """The point at a whole or fractional timestep: alpha and sigma linear in between.

    Exact for a flow; for variance-preserving tables alpha^2 + sigma^2 strays from 1 by at most a quarter of
    the squared angle between neighbours (about 1e-5 with 1000 timesteps). Raises BadInput outside 0..T-1.
    """
    last = len(schedule) - 1
    if not 0.0 <= t <= last:
        raise BadInput(f"timestep {t:g} lies outside the model's 0..{last}")
    low = min(int(t), last - 1)
    part = t - low
    alpha = (1.0 - part) * schedule.alphas[low] + part * schedule.alphas[low + 1]
    sigma = (1.0 - part) * schedule.sigmas[low] + part * schedule.sigmas[low + 1]
    return Point(float(t), float(alpha), float(sigma))


def point_at_ratio(schedule: NoiseSchedule, ratio: float) -> Point:
    """The point where sigma / alpha is `ratio`, or that end of the schedule which it lies beyond."""
    return point_at(schedule, float(timesteps_at(np.array([ratio]), schedule)[0]))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """A variance-preserving schedule stretched so that it ends in pure noise (Lin et al. 2024, algorithm 1)."""
    alphas = np.asarray(schedule.alphas)
    alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    return NoiseSchedule(_floats(alphas), _floats(np.sqrt(1.0 - alphas**2)))


def trajectory(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], end: float | None = None
) -> tuple[Point, ...]:
    """The points at `timesteps`, and the clean end or that at the timestep `end`: one more point than steps."""
    return (*(point_at(schedule, t) for t in timesteps), END if end is None else point_at(schedule, end))


def spaced_timesteps(
    spacing: Spacing, steps: int, schedule: NoiseSchedule, tokens: int | None = None
) -> tuple[float, ...]:
    """`steps` timesteps laid out by a model's spacing; `tokens` is the image's number of tokens, for dynamic shifts.

    Raises BadInput as `timestep_grid` does, and for a dynamic spacing without `tokens`.
    """
    t = np.asarray(timestep_grid(spacing.grid, steps, schedule, whole=spacing.whole, offset=spacing.offset))
    k, last = _shift_factor(spacing, tokens), len(schedule) - 1
    if spacing.grid == "flow_linspace" and spacing.dynamic is None:
        # diffusers draws the line down to its least sigma, which is shifted already, and then shifts the line
        t = np.interp(t, (1.0, last), (float(_shifted(np.ones(()), k, last)), last))
    return _floats(_shifted(t, k, last))


def reshifted(
    timesteps: tuple[float, ...], spacing: Spacing, old_tokens: int, new_tokens: int, schedule: NoiseSchedule
) -> tuple[float, ...]:
    """The same plan for an image of another size: shifts compose by multiplying their k, so k_new / k_old does it."""
    if spacing.dynamic is None:
        return timesteps
    k = _shift_factor(spacing, new_tokens) / _shift_factor(spacing, old_tokens)
    return _floats(_shifted(np.asarray(timesteps), k, len(schedule) - 1))


def make_plan(
    solver: str,
    steps: int,
    schedule: NoiseSchedule,
    *,
    grid: str = "trailing",
    guidance: float = 1.0,
    eta: float = 0.0,
    clip: bool = True,
    end: float | None = None,
) -> Plan:
    """A plan that visits `steps` timesteps of `grid`; raises BadInput as `timestep_grid` and `Plan` do."""
    return Plan(solver, timestep_grid(grid, steps, schedule), guidance=guidance, eta=eta, clip=clip, end=end)


def _linear(T: int, start: float, end: float) -> np.ndarray:
    return np.linspace(start, end, T)


def _scaled_linear(T: int, start: float, end: float) -> np.ndarray:
    return np.linspace(math.sqrt(start), math.sqrt(end), T) ** 2


def _cosine(T: int, start: float, end: float) -> np.ndarray:
    abar = np.cos((np.arange(T + 1) / T + 0.008) / 1.008 * math.pi / 2) ** 2
    return np.minimum(1.0 - abar[1:] / abar[:-1], MAX_BETA)


BETAS: dict[str, Callable[[int, float, float], np.ndarray]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


def _shift_factor(spacing: Spacing, tokens: int | None) -> float:
    """k of the shift: constant, or exp(m) with m on the line through the spacing's two image sizes."""
    if spacing.dynamic is None:
        return spacing.shift
    low, high, fewest, most = spacing.dynamic
    if tokens is None or fewest == most:
        raise BadInput(f"spacing: the shift {spacing.dynamic} needs two image sizes and the number of image tokens")
    return math.exp(low + (high - low) * (tokens - fewest) / (most - fewest))


def _shifted(t: np.ndarray, k: float, last: int) -> np.ndarray:
    if k == 1.0:
        return t  # whole timesteps stay whole to the last bit
    s = t / last
    return last * k * s / (1.0 + (k - 1.0) * s)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
