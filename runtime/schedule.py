"""Noise schedules and timestep grids: how much noise a timestep means, and which timesteps a sampler visits.

A variance-preserving schedule is made from betas:   abar_t = prod_{s<=t} (1 - beta_s),
                                                     alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)
A flow-matching schedule is a straight line:         alpha_t = 1 - s,  sigma_t = s,  s = t / (T - 1)

A grid picks N descending timesteps out of 0..T-1; a trajectory is these points and then the clean end,
alpha = 1, sigma = 0 (diffusers' `set_alpha_to_one`, `final_sigmas_type="zero"`), or the point the plan ends at. With
i = 0..N-1, w = 1 - i / (N - 1) and r = sigma / alpha:

    leading      (T // N) * (N - 1 - i)                                  Lin et al. 2024, table 2
    trailing     round(T - i * T / N) - 1                                the same
    linspace     (T - 1) * w                                             the same
    quad         (T - 1) * w^2                                           after Song et al. 2021 (DDIM), D.3
    karras       r^(1/7) = r_min^(1/7) + w * (r_max^(1/7) - r_min^(1/7)) Karras et al. 2022, eq. 5
    exponential  log r = log r_min + w * (log r_max - log r_min)         over the whole table
    logsnr       the same line, for -2 log r is the log-SNR              Lu et al. 2022, section 3.3

and those that some schedulers of diffusers have of their own. Flow tables have T + 1 entries here, t = 0..T:

    dpm_leading    (T // (N + 1)) * (N - i)                              DPM-Solver's family: one point more, and
    dpm_linspace   round((T - 1) * (N - i) / N)                          the last, t = 0, left out
    dpm_flow       (T - 1) * (N - i) / N                                 the same with `use_flow_sigmas`
    flow_trailing  T * (N - i) / N                                       the pipelines of Flux and its kin
    flow_linspace  1 + (T - 1) * w                                       FlowMatchEulerDiscreteScheduler by itself (SD3)
    lcm            (T // 50) * (50 - floor(50 i / N)) - 1                Luo et al. 2023; taught on 50 timesteps

Flow models then shift the grid, s' = k s / (1 + (k - 1) s) with s = t / T (Esser et al. 2024, section 5.3.2).

Karras and logsnr stay between LOG_RATIO_MIN and LOG_RATIO_MAX: a cosine table ends at r = 20000 and a flow at
infinity, where no image is left to be seen and steps are spent in vain.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from runtime.errors import BadInput, unknown_name
from runtime.spec import NoiseSchedule, Plan, Spacing

LOG_RATIO_MIN = -6.2  # r = 0.002, EDM's sigma_min
LOG_RATIO_MAX = 5.1  # r = 164, where DPM-Solver++ clips the cosine schedule too
KARRAS_RHO = 7.0
MAX_BETA = 0.999  # what diffusers caps a cosine beta at
LCM_TIMESTEPS = 50  # `original_inference_steps` of every published latent consistency model


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


def trajectory(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], end: float | None = None
) -> tuple[Point, ...]:
    """The points at `timesteps`, and the clean end or that at the timestep `end`: one more point than steps."""
    return (*(point_at(schedule, t) for t in timesteps), END if end is None else point_at(schedule, end))


def timestep_grid(
    kind: str, steps: int, schedule: NoiseSchedule, *, whole: bool = True, offset: int = 0
) -> tuple[float, ...]:
    """`steps` strictly descending timesteps of the grid `kind` (see the top of this file), `offset` above it.

    `whole` rounds them to the integer timesteps a discrete-time network was trained on; where two would fall
    together the noisier one moves up. Raises BadInput for an unknown kind, no steps, or more steps than
    timesteps.
    """
    if kind not in GRIDS:
        raise unknown_name("timestep grid", kind, GRIDS)
    if not 1 <= steps <= len(schedule):
        raise BadInput(f"{steps} steps: the model has {len(schedule)} timesteps, ask for 1 to {len(schedule)}")
    t = np.clip(GRIDS[kind](steps, schedule) + offset, 0, len(schedule) - 1)
    return _floats(_apart(np.round(t), len(schedule) - 1) if whole else t)


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


def _leading(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.arange(steps)[::-1] * (len(schedule) // steps)


def _trailing(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.round(len(schedule) - np.arange(steps) * (len(schedule) / steps)) - 1


def _linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 1, 0, steps)


def _quad(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return (len(schedule) - 1) * _ramp(steps) ** 2


def _karras(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    low, high = (math.exp(end / KARRAS_RHO) for end in _sane_ends(schedule))
    return _timesteps_at((low + _ramp(steps) * (high - low)) ** KARRAS_RHO, schedule)


def _exponential(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return _log_spaced(steps, schedule, _whole_ends(schedule))


def _logsnr(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return _log_spaced(steps, schedule, _sane_ends(schedule))


def _dpm_leading(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.arange(steps, 0, -1) * (len(schedule) // (steps + 1))


def _dpm_linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 1, 0, steps + 1)[:-1]


def _dpm_flow(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 2, 0, steps + 1)[:-1]


def _flow_linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 1, 1, steps)


def _lcm(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    taught = min(LCM_TIMESTEPS, len(schedule))
    if steps > taught:
        raise BadInput(f"{steps} steps: a latent consistency model was taught {taught} timesteps, ask for no more")
    places = taught - np.floor(np.linspace(0, taught, steps, endpoint=False))
    return places * (len(schedule) // taught) - 1


GRIDS: dict[str, Callable[[int, NoiseSchedule], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quad": _quad,
    "karras": _karras,
    "exponential": _exponential,
    "logsnr": _logsnr,
    "dpm_leading": _dpm_leading,
    "dpm_linspace": _dpm_linspace,
    "dpm_flow": _dpm_flow,
    "flow_trailing": _dpm_linspace,  # one line, rounded there and not here
    "flow_linspace": _flow_linspace,
    "lcm": _lcm,
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


def _ramp(steps: int) -> np.ndarray:
    """1 down to 0; a single step starts at the noisy end (in diffusers' linspace at the clean one)."""
    return np.linspace(1.0, 0.0, steps)


def _log_spaced(steps: int, schedule: NoiseSchedule, ends: tuple[float, float]) -> np.ndarray:
    low, high = ends
    return _timesteps_at(np.exp(low + _ramp(steps) * (high - low)), schedule)


def _whole_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """log(sigma / alpha) at the first and the last timestep where neither is zero."""
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    usable = np.flatnonzero((alphas > 0) & (sigmas > 0))
    if not usable.size:
        raise BadInput("noise schedule: at every timestep alpha or sigma is zero, no grid over log-SNR exists")
    first, last = usable[0], usable[-1]
    return math.log(sigmas[first] / alphas[first]), math.log(sigmas[last] / alphas[last])


def _sane_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    low, high = _whole_ends(schedule)
    return max(low, min(high, LOG_RATIO_MIN)), min(high, max(low, LOG_RATIO_MAX))


def _timesteps_at(ratios: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    """The fractional timesteps where sigma / alpha equals `ratios`, the exact inverse of `point_at`.

    Between neighbours:  sigma + f dsigma = r (alpha + f dalpha)  gives  f = (r alpha - sigma) / (dsigma - r
    dalpha).
    """
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    # the angle atan2(sigma, alpha) grows with sigma / alpha and stays finite where alpha is zero
    angles = np.arctan2(sigmas, alphas)
    low = np.clip(np.searchsorted(angles, np.arctan(ratios), side="right") - 1, 0, len(schedule) - 2)
    growth = np.diff(sigmas)[low] - ratios * np.diff(alphas)[low]
    missing = ratios * alphas[low] - sigmas[low]
    return low + np.clip(np.divide(missing, growth, out=np.zeros_like(ratios), where=growth > 0), 0.0, 1.0)


def _apart(t: np.ndarray, last: int) -> np.ndarray:
    """Whole timesteps, moved up where they do not strictly descend, down again where that passes the last."""
    places = np.arange(t.size)
    up = np.maximum.accumulate((t + places)[::-1])[::-1] - places
    return np.minimum(up, last - places)


def _floats(values: np.ndarray) -> tuple[float, ...]:
    return tuple(float(v) for v in values)
