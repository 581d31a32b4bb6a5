"""Timestep spacings: which N descending timesteps out of 0..T-1 a sampler visits.

With i = 0..N-1, w = 1 - i / (N - 1) and r = sigma / alpha:

    leading      (T // N) * (N - 1 - i)                                  Lin et al. 2024, table 2
    trailing     round(T - i * T / N) - 1                                same table
    linspace     (T - 1) * w                                             same table
    quad         (T - 1) * w^2                                           after Song et al. 2021 (DDIM), D.3
    karras       r^(1/7) = r_min^(1/7) + w * (r_max^(1/7) - r_min^(1/7)) Karras et al. 2022, eq. 5
    exponential  log r = log r_min + w * (log r_max - log r_min)         r over the full noise schedule
    logsnr       the same, as the log-SNR is -2 log r                    Lu et al. 2022, section 3.3
    beta         r = r_min + F(w) * (r_max - r_min)                      Lee et al. 2024; F the quantile of
                                                                         Beta(0.6, 0.6)
    ays_*        ten noise levels optimized for Stable Diffusion,        Sabour et al. 2024; other step counts are
                 SDXL and Stable Video Diffusion                         interpolated in log r, as in the paper

Spacings specific to some schedulers of diffusers. Flow schedules have T + 1 entries here, t = 0..T:

    dpm_leading    (T // (N + 1)) * (N - i)                              DPM-Solver family: N + 1 timesteps without
    dpm_linspace   round((T - 1) * (N - i) / N)                          the last, t = 0
    dpm_flow       (T - 1) * (N - i) / N                                 the same with `use_flow_sigmas`
    unipc_flow     1 + (T - 1) * (N - i) / N                             UniPC with `use_flow_sigmas`
    flow_trailing  T * (N - i) / N                                       pipelines of Flux and similar models
    flow_linspace  1 + (T - 1) * w                                       FlowMatchEulerDiscreteScheduler alone (SD3)
    lcm            (T // 50) * (50 - floor(50 i / N)) - 1                Luo et al. 2023; trained on 50 timesteps

karras and logsnr stay between LOG_RATIO_MIN and LOG_RATIO_MAX: a cosine schedule ends at r = 20000 and a flow at
infinity, where a sample contains no visible image and steps are wasted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.io.json_fields import boolean, check_fields, convert_errors, without_defaults
from diffpress.runtime.noise_schedule import NoiseSchedule, timesteps_at
from diffpress.runtime.sigma_spacing import (
    KARRAS_RHO,
    SigmaSpacing,
    beta_quantile,
    sigma_spacing_from_json,
)

ROUNDINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {"": np.asarray, "round": np.round, "floor": np.floor}
LATER_FIELDS = ("linear_shift", "terminal", "sigmas", "rounding", "count", "strided", "finite")


@dataclass(frozen=True)
class TimestepSpacing:
    """How a model's timesteps are spaced, for any number of steps and any image size.

    Flow models shift s = t / (T - 1) towards the noise, s' = k s / (1 + (k - 1) s) (Esser et al. 2024, section 5.3.2).

    Attributes:
        kind: A name in SPACINGS.
        offset: Added to the timesteps; latent diffusion's 'leading' spacing starts at 1.
        integer: Round to integer timesteps.
        shift: The k of the shift.
        dynamic: (m at the fewest tokens, m at the most, fewest, most): the shift becomes k = exp(m), with m linear in
            the image's number of tokens (Flux).
        linear_shift: A dynamic shift is k = m instead (`time_shift_type`).
        terminal: Stretch the shifted s of a flow so that the last one is this (`shift_terminal`).
        sigmas: Space the noise levels in sigma / alpha, or in s for a flow.
        rounding: How timesteps are rounded for the network while noise levels are not: '', 'round' or 'floor'.
        count: Number of lowest timesteps that are spaced (`lambda_min_clipped`), for 'lcm' the number of timesteps of
            training (`original_inference_steps`); None for all, or 50.
        strided: Each step ends T // N timesteps lower, whatever the next timestep (diffusers' DDIM).
        finite: At zero terminal SNR alpha is 2^-12 instead of 0 (diffusers' Euler, DPM-Solver and UniPC).
    """

    kind: str = "trailing"
    offset: int = 0
    integer: bool = True
    shift: float = 1.0
    dynamic: tuple[float, float, float, float] | None = None
    linear_shift: bool = False
    terminal: float | None = None
    sigmas: SigmaSpacing | None = None
    rounding: str = ""
    count: int | None = None
    strided: bool = False
    finite: bool = False

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS or (self.count is not None and self.count < 1):
            raise InvalidInputError(f"spacing: rounding '{self.rounding}' or count {self.count} is invalid")
        if self.terminal is not None and not 0.0 <= self.terminal < 1.0:
            raise InvalidInputError(f"spacing: shift_terminal {self.terminal} must lie in [0, 1)")
        if self.offset < 0 or not (np.isfinite(self.shift) and self.shift > 0):
            raise InvalidInputError(
                f"spacing: offset {self.offset} must not be negative and shift {self.shift} must be above 0"
            )

    def to_json(self) -> dict[str, Any]:
        """Return the spacing as JSON-serializable data, with those of LATER_FIELDS that are in use."""
        return without_defaults(self, LATER_FIELDS)


def spacing_from_json(data: Any, where: str = "spacing") -> TimestepSpacing:
    """Read a timestep spacing from its JSON form.

    Raises:
        InvalidInputError: An entry is unknown or of the wrong type; the message starts with `where`.
    """
    raw = check_fields(TimestepSpacing, data, where)
    with convert_errors(where):
        dynamic = raw.get("dynamic")
        return TimestepSpacing(
            kind=str(raw.get("kind", "trailing")),
            offset=int(raw.get("offset", 0)),
            integer=boolean(raw.get("integer", True)),
            shift=float(raw.get("shift", 1.0)),
            dynamic=None if dynamic is None else _four(dynamic),
            linear_shift=boolean(raw.get("linear_shift", False)),
            terminal=None if raw.get("terminal") is None else float(raw["terminal"]),
            sigmas=sigma_spacing_from_json(raw.get("sigmas"), f"{where}.sigmas"),
            rounding=str(raw.get("rounding", "")),
            count=None if raw.get("count") is None else int(raw["count"]),
            strided=boolean(raw.get("strided", False)),
            finite=boolean(raw.get("finite", False)),
        )


def _four(values: Any) -> tuple[float, float, float, float]:
    first, second, third, fourth = (float(v) for v in values)
    return first, second, third, fourth


LOG_RATIO_MIN = -6.2  # r = 0.002, EDM's sigma_min
LOG_RATIO_MAX = 5.1  # r = 164, where DPM-Solver++ also clips the cosine schedule
LCM_TIMESTEPS = 50  # `original_inference_steps` of every published latent consistency model
# r at the ten published steps
AYS = {
    "ays_sd15": (14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152),
    "ays_sdxl": (14.615, 6.315, 3.771, 2.181, 1.342, 0.862, 0.555, 0.380, 0.234, 0.113),
    "ays_svd": (700.0, 54.5, 15.886, 7.977, 4.248, 1.789, 0.981, 0.403, 0.173, 0.034),
}


def timesteps_for(
    kind: str, steps: int, schedule: NoiseSchedule, *, integer: bool = True, offset: int = 0
) -> tuple[float, ...]:
    """Return `steps` strictly descending timesteps.

    Args:
        kind: Timestep spacing, see the module docstring.
        steps: Number of timesteps.
        schedule: Noise schedule of the model.
        integer: Round to the integer timesteps that a discrete-time network was trained on; if two coincide, the
            noisier one moves up.
        offset: Added to every timestep.

    Raises:
        InvalidInputError: Unknown spacing, no steps, or more steps than timesteps.
    """
    if kind not in SPACINGS:
        raise unknown_name("timestep spacing", kind, SPACINGS)
    if not 1 <= steps <= len(schedule):
        raise InvalidInputError(f"{steps} steps: the model has {len(schedule)} timesteps, use 1 to {len(schedule)}")
    t = np.clip(SPACINGS[kind](steps, schedule) + offset, 0, len(schedule) - 1)
    return tuple((_apart(np.round(t), len(schedule) - 1) if integer else t).tolist())


def _leading(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.arange(steps)[::-1] * (len(schedule) // steps)


def _trailing(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.round(len(schedule) - np.arange(steps) * (len(schedule) / steps)) - 1


def _linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(0, len(schedule) - 1, steps)[::-1] if steps > 1 else np.array([len(schedule) - 1.0])


def _quad(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return (len(schedule) - 1) * _ramp(steps) ** 2


def _karras(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    low, high = (math.exp(end / KARRAS_RHO) for end in _bounded_ends(schedule))
    return timesteps_at((low + _ramp(steps) * (high - low)) ** KARRAS_RHO, schedule)


def _exponential(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return _log_spaced(steps, schedule, _table_ends(schedule))


def _logsnr(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return _log_spaced(steps, schedule, _bounded_ends(schedule))


def _beta(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    low, high = (math.exp(end) for end in _table_ends(schedule))
    return timesteps_at(low + beta_quantile(_ramp(steps)) * (high - low), schedule)


def _aligned(ratios: tuple[float, ...], steps: int, schedule: NoiseSchedule) -> np.ndarray:
    positions = np.linspace(0.0, len(ratios) - 1.0, steps)
    return timesteps_at(np.exp(np.interp(positions, np.arange(len(ratios)), np.log(ratios))), schedule)


def _dpm_leading(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.arange(steps, 0, -1) * (len(schedule) // (steps + 1))


def _dpm_linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(0, len(schedule) - 1, steps + 1)[:0:-1]


def _dpm_flow(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 2, 0, steps + 1)[:-1]


def _unipc_flow(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 1, 1, steps + 1)[:-1]


def _flow_linspace(steps: int, schedule: NoiseSchedule) -> np.ndarray:
    return np.linspace(len(schedule) - 1, 1, steps)


def lcm_timesteps(steps: int, schedule: NoiseSchedule, count: int | None = None, strength: float = 1.0) -> np.ndarray:
    """Return the timesteps of a latent consistency model that was trained on `count` of them (default 50).

    They are spaced over the lowest `strength` of those.
    """
    trained = min(count or LCM_TIMESTEPS, len(schedule))
    used = int(trained * strength)
    if steps > used:
        lowest = "" if strength == 1.0 else f", of which strength {strength:g} leaves {used}"
        raise InvalidInputError(
            f"{steps} steps: a latent consistency model is trained on {trained} timesteps{lowest}, use at most as many "
            "steps"
        )
    positions = used - np.floor(np.linspace(0, used, steps, endpoint=False))
    return positions * (len(schedule) // trained) - 1


SPACINGS: dict[str, Callable[[int, NoiseSchedule], np.ndarray]] = {
    "leading": _leading,
    "trailing": _trailing,
    "linspace": _linspace,
    "quad": _quad,
    "karras": _karras,
    "exponential": _exponential,
    "logsnr": _logsnr,
    "beta": _beta,
    **{name: partial(_aligned, ratios) for name, ratios in AYS.items()},
    "dpm_leading": _dpm_leading,
    "dpm_linspace": _dpm_linspace,
    "dpm_flow": _dpm_flow,
    "unipc_flow": _unipc_flow,
    "flow_trailing": _dpm_linspace,  # the same line; only dpm_linspace is rounded
    "flow_linspace": _flow_linspace,
    "lcm": lcm_timesteps,
}


def _ramp(steps: int) -> np.ndarray:
    """Descend from 1 to 0. A single step is 1, the noisy end; diffusers' linspace would take the clean end."""
    return np.linspace(1.0, 0.0, steps)


def _log_spaced(steps: int, schedule: NoiseSchedule, ends: tuple[float, float]) -> np.ndarray:
    low, high = ends
    return timesteps_at(np.exp(low + _ramp(steps) * (high - low)), schedule)


def _table_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    """Return log(sigma / alpha) at the first and the last timestep where neither is zero."""
    alphas, sigmas = np.asarray(schedule.alphas), np.asarray(schedule.sigmas)
    usable = np.flatnonzero((alphas > 0) & (sigmas > 0))
    if not usable.size:
        raise InvalidInputError(
            "noise schedule: alpha or sigma is zero at every timestep, so no spacing in sigma / alpha is possible"
        )
    first, last = usable[0], usable[-1]
    return math.log(sigmas[first] / alphas[first]), math.log(sigmas[last] / alphas[last])


def _bounded_ends(schedule: NoiseSchedule) -> tuple[float, float]:
    low, high = _table_ends(schedule)
    return max(low, min(high, LOG_RATIO_MIN)), min(high, max(low, LOG_RATIO_MAX))


def _apart(t: np.ndarray, last: int) -> np.ndarray:
    """Make integer timesteps strictly descending: move them up, or down if that would exceed the last timestep."""
    index = np.arange(t.size)
    up = np.maximum.accumulate((t + index)[::-1])[::-1] - index
    return np.minimum(up, last - index)
