"""The timesteps of a plan in a model's spacing: shifted, and with the noise levels where diffusers has others.

flow schedule      s = t / (T - 1) is shifted, stretched to end at `terminal`, and spaced in s itself (`sigmas`)
use_flow_sigmas    the same line, but the network gets integer timesteps, rounded down
sigmas             levels spaced in sigma / alpha (sigma_spacing.py), and timesteps interpolated in its logarithm
finite             sigma / alpha = 4096 at the last timestep of a schedule with zero terminal SNR
strided            steps end T // N timesteps lower
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.io.json_fields import floats
from diffpress.runtime.noise_schedule import NoiseSchedule, is_flow
from diffpress.runtime.sigma_spacing import spaced_levels, spaced_sigmas, table_ratios
from diffpress.runtime.timesteps import ROUNDINGS, SPACINGS, TimestepSpacing, lcm_timesteps, timesteps_for

FLOW_SIGMAS = ("dpm_flow", "unipc_flow")
FLOW_EPSILON = 1e-6  # distance from pure noise at which diffusers' UniPC starts flows


def with_kind(spacing: TimestepSpacing, kind: str) -> TimestepSpacing:
    """Return a spacing of this kind that a user chose; it keeps the timestep shift of a flow model.

    Raises:
        InvalidInputError: Unknown spacing.
    """
    if kind not in SPACINGS:
        raise unknown_name("timestep spacing", kind, SPACINGS)
    return TimestepSpacing(
        kind, 0, spacing.integer, spacing.shift, spacing.dynamic, spacing.linear_shift, spacing.terminal
    )


class Spaced(NamedTuple):
    """Timesteps of a plan, with its `ratios` and `stride` (see SamplingPlan)."""

    timesteps: tuple[float, ...]
    ratios: tuple[float, ...] = ()
    stride: int = 0


def space(spacing: TimestepSpacing, steps: int, schedule: NoiseSchedule, tokens: int | None = None) -> Spaced:
    """Return `steps` timesteps in a model's spacing, shifted, with their noise levels where the schedule has others.

    Args:
        spacing: The model's timestep spacing.
        steps: Number of timesteps.
        schedule: The model's noise schedule.
        tokens: The image's number of tokens, needed for dynamic shifts.

    Raises:
        InvalidInputError: As in `timesteps_for`, and for a dynamic shift without `tokens`.
    """
    if spacing.kind in FLOW_SIGMAS:
        return _flow_sigmas(spacing, steps, len(schedule) - 1)
    _check_offset(spacing, steps, schedule)
    if spacing.count is not None:
        t = np.asarray(_counted(spacing, steps, schedule))
    else:
        t = np.asarray(timesteps_for(spacing.kind, steps, schedule, integer=spacing.integer, offset=spacing.offset))
    if is_flow(schedule):
        return Spaced(floats(_shifted_flow(t, spacing, tokens, len(schedule) - 1)))
    if spacing.sigmas is not None:
        t, levels = spaced_levels(spacing.sigmas, t, schedule)
        return Spaced(floats(ROUNDINGS[spacing.rounding](t)), floats(levels))
    k = _shift_factor(spacing, tokens)
    timesteps = floats(_shifted(t, k, len(schedule) - 1))
    ratios: tuple[float, ...] = ()
    is_fractional = spacing.kind == "linspace" and any(t % 1.0 for t in timesteps)  # diffusers interpolates the ratio
    if is_fractional or (spacing.finite and timesteps[0] == len(schedule) - 1):
        table = table_ratios(schedule)
        ratios = floats(np.interp(timesteps, np.arange(len(table)), table))
    return Spaced(timesteps, ratios, _stride(timesteps, len(schedule) // steps) if spacing.strided else 0)


def _check_offset(spacing: TimestepSpacing, steps: int, schedule: NoiseSchedule) -> None:
    """Check that the offset leaves the noisiest timestep on the schedule; it is clamped in one step only."""
    if spacing.kind not in ("leading", "dpm_leading") or steps > len(schedule):
        return
    parts = steps + (spacing.kind == "dpm_leading")
    first = len(schedule) // parts * (parts - 1) + spacing.offset
    if first > len(schedule) - 1:
        raise InvalidInputError(
            f"{steps} steps: with an offset (steps_offset) of {spacing.offset} the first timestep, {first}, is beyond "
            f"the last one, {len(schedule) - 1}; use fewer steps or another spacing"
        )


def _stride(timesteps: tuple[float, ...], stride: int) -> int:
    """The stride of a plan with these timesteps; 0 if its steps end at the next timestep and at the end anyway."""
    following = [*timesteps[1:], -1.0]
    lower = [max(t - stride, -1.0) for t in timesteps]
    return 0 if lower == following else stride


def _flow_sigmas(spacing: TimestepSpacing, steps: int, last: int) -> Spaced:
    """The levels of `use_flow_sigmas`, computed as diffusers does: its rounded timesteps depend on the last bit."""
    if not 1 <= steps <= last:
        raise InvalidInputError(f"{steps} steps: the model has {last} timesteps, use 1 to {last}")
    ramp = np.linspace(1, 1 / last, steps + 1)
    s = ramp[:-1] if spacing.kind == "unipc_flow" else (1.0 - ramp)[:0:-1]
    s = spacing.shift * s / (1 + (spacing.shift - 1) * s)
    if spacing.kind == "unipc_flow" and abs(s[0] - 1) < FLOW_EPSILON:
        s[0] -= FLOW_EPSILON  # so that log(alpha) is finite
    return Spaced(floats(ROUNDINGS[spacing.rounding](s * last)), floats(s / (1.0 - s)) if spacing.rounding else ())


def _shifted_flow(t: np.ndarray, spacing: TimestepSpacing, tokens: int | None, last: int) -> np.ndarray:
    k = _shift_factor(spacing, tokens)
    if spacing.kind == "flow_linspace" and spacing.dynamic is None:
        # diffusers' linspace ends at its smallest sigma, which is already shifted, and is then shifted again
        t = np.interp(t, (1.0, last), (float(_shifted(np.ones(()), k, last)), last))
    t = _shifted(t, k, last)
    if spacing.terminal:
        clean = 1.0 - t / last
        if clean[-1] <= 0.0:
            raise InvalidInputError("1 step: the scheduler's shift_terminal needs at least 2 steps")
        t = last * (1.0 - clean * (1.0 - spacing.terminal) / clean[-1])
    if spacing.sigmas is not None:
        t = last * spaced_sigmas(spacing.sigmas, float(t[-1] / last), float(t[0] / last), t.size)
    return t


def reshifted(
    timesteps: tuple[float, ...], spacing: TimestepSpacing, old_tokens: int, new_tokens: int, schedule: NoiseSchedule
) -> tuple[float, ...]:
    """Return a plan's timesteps for another image size; shifts compose, so shifting by k_new / k_old suffices."""
    if spacing.dynamic is None:
        return timesteps
    if spacing.terminal or spacing.sigmas is not None:
        if timesteps != space(spacing, len(timesteps), schedule, old_tokens).timesteps:
            raise InvalidInputError("the plan's own timesteps cannot be shifted to another image size; give --steps")
        return space(spacing, len(timesteps), schedule, new_tokens).timesteps
    k = _shift_factor(spacing, new_tokens) / _shift_factor(spacing, old_tokens)
    return floats(_shifted(np.asarray(timesteps), k, len(schedule) - 1))


def _shift_factor(spacing: TimestepSpacing, tokens: int | None) -> float:
    """The k of the shift: constant, or exp(m) or m with m linear between the spacing's two image sizes."""
    if spacing.dynamic is None:
        return spacing.shift
    low, high, fewest, most = spacing.dynamic
    if tokens is None or fewest == most:
        raise InvalidInputError(
            f"spacing: the dynamic shift {spacing.dynamic} needs two different sizes and the number of image tokens"
        )
    m = low + (high - low) * (tokens - fewest) / (most - fewest)
    return m if spacing.linear_shift else math.exp(m)


def _shifted(t: np.ndarray, k: float, last: int) -> np.ndarray:
    if k == 1.0:
        return t  # keeps integer timesteps exact
    s = t / last
    return np.minimum(last * k * s / (1.0 + (k - 1.0) * s), last)  # rounding could exceed the last timestep


def _counted(spacing: TimestepSpacing, steps: int, schedule: NoiseSchedule) -> tuple[float, ...]:
    """Timesteps of a spacing that leaves out the noisiest ones; 'trailing' then has fewer than `steps`."""
    count, last = spacing.count or len(schedule), len(schedule) - 1
    if spacing.kind == "lcm":
        return floats(lcm_timesteps(steps, schedule, count))
    if spacing.kind == "dpm_leading":
        t = np.arange(steps, 0, -1) * (count // (steps + 1)) + spacing.offset
    elif spacing.kind == "dpm_linspace":
        t = np.round(np.linspace(0, count - 1, steps + 1)[:0:-1])
    else:
        t = np.round(np.arange(count, 0, -len(schedule) / steps)) - 1
    if steps > count or t[0] > last or (np.diff(t) >= 0).any():
        raise InvalidInputError(f"{steps} steps: too many for the {count} lowest timesteps that the scheduler spaces")
    return floats(t)
