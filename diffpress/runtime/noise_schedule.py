"""Noise schedules: alpha_t and sigma_t of x_t = alpha_t x_0 + sigma_t eps, as tables over the timesteps 0..T-1.

    variance preserving, from betas     abar_t = prod_{s<=t} (1 - beta_s)
                                        alpha_t = sqrt(abar_t),  sigma_t = sqrt(1 - abar_t)
    flow matching, a straight line      alpha_t = 1 - s,  sigma_t = s,  s = t / (T - 1)

`noise_level_at` reads a table at any timestep, integer or not; `timesteps_at` is its inverse in sigma / alpha. Which
timesteps a sampler visits is decided in timesteps.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np

from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.io.json_fields import floats


@dataclass(frozen=True)
class NoiseSchedule:
    """Tables of alpha_t and sigma_t at the integer timesteps 0..T-1, T values each; noise grows with t."""

    alphas: tuple[float, ...]
    sigmas: tuple[float, ...]

    def __post_init__(self) -> None:
        alphas, sigmas = np.asarray(self.alphas), np.asarray(self.sigmas)
        if alphas.ndim != 1 or alphas.shape != sigmas.shape or alphas.size < 2:
            raise InvalidInputError(
                f"noise schedule: alphas {alphas.shape} and sigmas {sigmas.shape} must be equally long lists"
            )
        if not (np.isfinite(alphas).all() and np.isfinite(sigmas).all()):
            raise InvalidInputError("noise schedule: alphas and sigmas must be finite numbers")
        if (alphas < 0).any() or (sigmas < 0).any() or (np.diff(alphas) > 0).any() or (np.diff(sigmas) < 0).any():
            raise InvalidInputError(
                "noise schedule: as t grows, alphas must fall and sigmas must grow, and none may be negative"
            )

    def __len__(self) -> int:
        return len(self.alphas)

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        """Cached because every batch looks up its fused sampling program by the schedule, and the tables are long."""
        return hash((self.alphas, self.sigmas))


FLOW_TOLERANCE = 1e-9
MAX_BETA = 0.999  # diffusers' upper limit for the betas of the cosine schedule


class NoiseLevel(NamedTuple):
    """Noise level of a sample x_t = alpha * x_0 + sigma * eps, with the timestep that the network gets for it."""

    t: float
    alpha: float
    sigma: float


CLEAN = NoiseLevel(t=0.0, alpha=1.0, sigma=0.0)


def betas_schedule(kind: str, T: int = 1000, start: float = 1e-4, end: float = 0.02) -> NoiseSchedule:
    """Return the variance-preserving schedule of a diffusers `beta_schedule`, computed in float64.

    Args:
        kind: 'linear', 'scaled_linear' (linear in sqrt(beta), latent diffusion) or 'squaredcos_cap_v2' (cosine, Nichol
            & Dhariwal 2021, eq. 17; ignores `start` and `end`).
        T: Number of timesteps.
        start: First beta.
        end: Last beta.

    Raises:
        InvalidInputError: Unknown kind, or betas outside (0, 1).

    Examples:
        >>> import diffpress as dp
        >>> schedule = dp.betas_schedule("linear", 1000, 1e-4, 0.02)
        >>> len(schedule), round(schedule.sigmas[0], 4)
        (1000, 0.01)
    """
    if kind not in BETAS:
        raise unknown_name("beta schedule", kind, BETAS)
    if T < 2 or not 0.0 < start <= end < 1.0:
        raise InvalidInputError(
            f"beta schedule: {T} timesteps from {start} to {end}; need at least 2 and 0 < start <= end < 1"
        )
    abar = np.cumprod(1.0 - BETAS[kind](T, start, end))
    return NoiseSchedule(floats(np.sqrt(abar)), floats(np.sqrt(1.0 - abar)))


def flow_schedule(T: int = 1000) -> NoiseSchedule:
    """Return the rectified flow schedule over T timesteps: data at t = 0, pure noise at t = T - 1.

    Examples:
        >>> import diffpress as dp
        >>> dp.flow_schedule(3).sigmas
        (0.0, 0.5, 1.0)
    """
    if T < 2:
        raise InvalidInputError(f"flow schedule: {T} timesteps; need at least 2")
    s = np.arange(T) / (T - 1)
    return NoiseSchedule(floats(1.0 - s), floats(s))


def noise_level_at(schedule: NoiseSchedule, t: float) -> NoiseLevel:
    """Return the noise level at an integer or fractional timestep, interpolated linearly in alpha and sigma.

    This is exact for a flow. For variance-preserving tables alpha^2 + sigma^2 deviates from 1 by at most a quarter of
    the squared angle between neighbours, about 1e-5 with 1000 timesteps.

    Raises:
        InvalidInputError: The timestep is outside 0..T-1.
    """
    last = len(schedule) - 1
    if not 0.0 <= t <= last:
        raise InvalidInputError(f"timestep {t:g} is outside the model's 0..{last}")
    low = min(int(t), last - 1)
    fraction = t - low
    alpha = (1.0 - fraction) * schedule.alphas[low] + fraction * schedule.alphas[low + 1]
    sigma = (1.0 - fraction) * schedule.sigmas[low] + fraction * schedule.sigmas[low + 1]
    return NoiseLevel(float(t), float(alpha), float(sigma))


def is_flow(schedule: NoiseSchedule) -> bool:
    """Whether the schedule is a straight line, alpha + sigma = 1, instead of variance preserving."""
    middle = len(schedule) // 2
    return abs(schedule.alphas[middle] + schedule.sigmas[middle] - 1.0) < FLOW_TOLERANCE


def noise_level_of_ratio(schedule: NoiseSchedule, t: float, ratio: float) -> NoiseLevel:
    """Return the noise level with sigma / alpha = `ratio`, at which the network gets timestep t."""
    alpha = 1.0 / (1.0 + ratio) if is_flow(schedule) else 1.0 / math.hypot(1.0, ratio)
    return NoiseLevel(float(t), alpha, ratio * alpha)


def noise_level_at_ratio(schedule: NoiseSchedule, ratio: float) -> NoiseLevel:
    """Return the noise level where sigma / alpha is `ratio`, clamped to the ends of the schedule."""
    return noise_level_at(schedule, float(timesteps_at(np.array([ratio]), schedule)[0]))


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """Rescale a variance-preserving schedule so that it ends in pure noise (Lin et al. 2024, algorithm 1)."""
    alphas = np.asarray(schedule.alphas)
    alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    return NoiseSchedule(floats(alphas), floats(np.sqrt(1.0 - alphas**2)))


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


def timesteps_at(ratios: np.ndarray, schedule: NoiseSchedule) -> np.ndarray:
    """Return the fractional timesteps where sigma / alpha equals `ratios`: the exact inverse of `noise_level_at`.

    Between neighbours, sigma + f dsigma = r (alpha + f dalpha) gives f = (r alpha - sigma) / (dsigma - r dalpha).
    Ratios beyond the schedule give its ends.
    """
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    # the angle atan2(sigma, alpha) grows with sigma / alpha and stays finite where alpha is zero
    angles = np.arctan2(sigmas, alphas)
    low = np.clip(np.searchsorted(angles, np.arctan(ratios), side="right") - 1, 0, len(schedule) - 2)
    growth = np.diff(sigmas)[low] - ratios * np.diff(alphas)[low]
    missing = ratios * alphas[low] - sigmas[low]
    return low + np.clip(np.divide(missing, growth, out=np.zeros_like(ratios), where=growth > 0), 0.0, 1.0)
