"""Noise levels spaced in r = sigma / alpha instead of in timesteps, as diffusers' `use_*_sigmas` space them.

With w falling evenly from 1 to 0 between the lowest and the highest r:

    karras        r^(1/7) = low^(1/7) + w (high^(1/7) - low^(1/7))      Karras et al. 2022, eq. 5
    exponential   log r = log low + w (log high - log low)
    lu            the same: diffusers' `use_lu_lambdas`
    beta          r = low + F(w) (high - low)                           F the quantile of Beta(0.6, 0.6)

The timestep that the network gets for a level is interpolated in log r between the table's entries. diffusers computes
both in float32 from the table, and so do these functions, because a rounded timestep depends on the last bit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.io.json_fields import boolean, check_fields, convert_errors
from diffpress.runtime.noise_schedule import NoiseSchedule

KARRAS_RHO = 7.0
BETA_SHAPE = 0.6  # both parameters of the Beta distribution, as published
LEAST_RATIO = 1e-10
SMALLEST_ALPHA_SQUARED = 2.0**-24  # diffusers' replacement for 0 at the end of a schedule with zero terminal SNR
KINDS = ("karras", "exponential", "lu", "beta")


@dataclass(frozen=True)
class SigmaSpacing:
    """Spacing of the noise levels in sigma / alpha.

    Attributes:
        kind: One of KINDS.
        low: Lowest sigma / alpha; None for that of the lowest timestep.
        high: Highest sigma / alpha; None for that of the highest timestep.
        full_table: `low` and `high` default to the ends of the noise schedule, not to those of the timesteps.
    """

    kind: str
    low: float | None = None
    high: float | None = None
    full_table: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise unknown_name("spacing of sigmas", self.kind, KINDS)
        for value in (self.low, self.high):
            if value is not None and not (np.isfinite(value) and value > 0.0):
                raise InvalidInputError(f"spacing: sigma_min {self.low} and sigma_max {self.high} must be above 0")


def sigma_spacing_from_json(data: Any, where: str) -> SigmaSpacing | None:
    """Read a spacing of sigmas from its JSON form."""
    if data is None:
        return None
    raw = check_fields(SigmaSpacing, data, where)
    with convert_errors(where):
        low, high = (None if raw.get(name) is None else float(raw[name]) for name in ("low", "high"))
        return SigmaSpacing(str(raw["kind"]), low, high, boolean(raw.get("full_table", False)))


def table_ratios(schedule: NoiseSchedule) -> np.ndarray:
    """Return sigma / alpha at every timestep, float32 [T]; finite at zero terminal SNR."""
    abar = np.square(np.asarray(schedule.alphas)).astype(np.float32)
    abar = np.where(abar == 0.0, np.float32(SMALLEST_ALPHA_SQUARED), abar)
    ratios: np.ndarray = np.sqrt((1 - abar) / abar)
    return ratios


def spaced_sigmas(spacing: SigmaSpacing, low: float, high: float, steps: int) -> np.ndarray:
    """Return `steps` descending values between `high` and `low`, or between the spacing's own ends."""
    low = low if spacing.low is None else spacing.low
    high = high if spacing.high is None else spacing.high
    if spacing.kind == "karras":
        ramp = np.linspace(0, 1, steps)
        top, bottom = high ** (1 / KARRAS_RHO), low ** (1 / KARRAS_RHO)
        karras: np.ndarray = (top + ramp * (bottom - top)) ** KARRAS_RHO
        return karras
    if spacing.kind == "beta":
        return low + beta_quantile(1 - np.linspace(0, 1, steps)) * (high - low)
    return np.exp(np.linspace(math.log(high), math.log(low), steps))


def spaced_levels(
    spacing: SigmaSpacing, timesteps: np.ndarray, schedule: NoiseSchedule
) -> tuple[np.ndarray, np.ndarray]:
    """Return timesteps of the network and ratios sigma / alpha, in place of those of the given timesteps."""
    table = table_ratios(schedule)
    ends = np.array([len(table) - 1, 0]) if spacing.full_table else timesteps[[0, -1]]
    high, low = np.interp(ends, np.arange(len(table)), table)
    ratios = spaced_sigmas(spacing, float(low), float(high), len(timesteps))
    return log_timesteps(ratios, table), ratios


def log_timesteps(ratios: np.ndarray, table: np.ndarray) -> np.ndarray:
    """Return the fractional timesteps of ratios sigma / alpha, interpolated in their logarithm."""
    logs = np.log(np.maximum(table, np.float32(LEAST_RATIO)))
    wanted = np.log(np.maximum(ratios, LEAST_RATIO))
    low = np.clip(np.searchsorted(logs, wanted, side="right") - 1, 0, len(table) - 2)
    weight = np.clip((logs[low] - wanted) / (logs[low] - logs[low + 1]), 0.0, 1.0)
    timesteps: np.ndarray = (1 - weight) * low + weight * (low + 1)
    return timesteps


def beta_quantile(p: np.ndarray, shape: float = BETA_SHAPE) -> np.ndarray:
    """Return the quantiles of Beta(shape, shape) at probabilities p, in float64, accurate to 1e-7.

    With x = u^(1 / shape) the integral of x^(shape - 1) (1 - x)^(shape - 1) has no pole at 0. It is computed on 0..1/2
    with the trapezoidal rule and inverted by interpolation; the other half is its mirror image.
    """
    u = np.linspace(0.0, 0.5**shape, 8193)
    density = (1.0 - u ** (1.0 / shape)) ** (shape - 1.0)
    mass = np.concatenate([[0.0], np.cumsum(density[1:] + density[:-1])])
    lower = np.interp(np.minimum(p, 1.0 - p), 0.5 * mass / mass[-1], u) ** (1.0 / shape)
    return np.where(p <= 0.5, lower, 1.0 - lower)
