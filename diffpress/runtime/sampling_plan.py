"""The sampling plan: solver, timesteps, guidance and corrections that a model is sampled with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import boolean, floats, known, reading
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel, NoiseSchedule, noise_level_at
from diffpress.runtime.timesteps import timesteps_for

STARTS = ("marginal", "noise", "unit")


@dataclass(frozen=True)
class OutputCorrection:
    """What takes off what rounding does to a network's output on the average: (out - bias[channel]) / (1 + slope)."""

    slope: float
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.slope) and self.slope > -1.0 and np.isfinite(self.bias).all()):
            raise InvalidInputError(
                f"plan: a correction's slope {self.slope:g} must lie above -1, and slope and bias be finite"
            )


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3): x_0 is bounded to -s..s and divided by s.

    s is each sample's `ratio` quantile of |x_0|, at least 1 and at most `max` (None: no bound), on data in -1..1.
    """

    ratio: float = 0.995
    max: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0 or not (self.max is None or (np.isfinite(self.max) and self.max >= 1.0)):
            raise InvalidInputError(
                f"threshold: ratio {self.ratio:g} must lie in (0, 1], and max {self.max} be at least 1"
            )


@dataclass(frozen=True)
class SamplingPlan:
    """How the model is meant to be sampled: a solver's name, the descending timesteps, and the guidance
    weight.

    `guidance` is the classifier-free guidance weight w of eps_null + w * (eps_label - eps_null); 1 switches
    it off and costs one call a step instead of two. It acts where low < sigma / alpha <= high for
    `guidance_interval` (low, high; None: without end), and elsewhere a step costs one call (Kynkaanniemi et al. 2024);
    `guidance_rescale` is phi of Lin et al. 2024, eq. 15-16: how far the guided output gets back the spread of the
    given half's. `eta` is DDIM's noise share. `clip` bounds the predicted x_0 to the data range at each step,
    `threshold` in its place by each sample's own values. `start` is the spread of the noise to start from: 'marginal'
    that of noised data, 'noise' sigma alone, 'unit' 1; they differ by parts in a thousand. `end` is the timestep at
    whose noise the last step stops, None for clean data (some checkpoints end at timestep 0, diffusers'
    `set_alpha_to_one: false`). `output_corrections` take off a quantized network's output what rounding does to it on the
    average, one for each timestep, or none (PTQD, He et al. 2023).
    """

    solver: str
    timesteps: tuple[float, ...]
    guidance: float = 1.0
    eta: float = 0.0
    clip: bool = True
    end: float | None = None
    output_corrections: tuple[OutputCorrection, ...] = ()
    start: str = STARTS[0]
    threshold: Threshold | None = None
    guidance_interval: tuple[float, float | None] | None = None
    guidance_rescale: float = 0.0

    def __post_init__(self) -> None:
        t = np.asarray(self.timesteps, dtype=float)
        if t.size < 1 or not np.isfinite(t).all() or (t < 0).any() or (np.diff(t) >= 0).any():
            raise InvalidInputError(
                "plan: timesteps must be one or more finite, non-negative, strictly descending numbers"
            )
        if not (np.isfinite(self.guidance) and np.isfinite(self.eta) and 0.0 <= self.eta <= 1.0):
            raise InvalidInputError(f"plan: guidance {self.guidance} must be finite and eta {self.eta} lie in [0, 1]")
        if not 0.0 <= self.guidance_rescale <= 1.0:
            raise InvalidInputError(f"plan: guidance_rescale {self.guidance_rescale} must lie in [0, 1]")
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not (np.isfinite(low) and low >= 0.0 and (high is None or (np.isfinite(high) and high > low))):
                raise InvalidInputError(
                    f"plan: guidance_interval ({low}, {high}) must be two values of sigma / alpha, 0 <= low < high, "
                    "or null for no upper end"
                )
        if self.start not in STARTS:
            raise InvalidInputError(f"plan: start '{self.start}' is not one of {', '.join(STARTS)}")
        if self.end is not None and not 0.0 <= self.end <= t[-1]:
            raise InvalidInputError(f"plan: end {self.end} must be a timestep not above the last one, {t[-1]:g}")
        if self.output_corrections and len(self.output_corrections) != t.size:
            raise InvalidInputError(
                f"plan: {len(self.output_corrections)} corrections for {t.size} timesteps; one each, or none"
            )

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @property
    def without_corrections(self) -> SamplingPlan:
        """The plan for another network than the one that the corrections were measured on."""
        return replace(self, output_corrections=())

    def over(self, timesteps: tuple[float, ...]) -> SamplingPlan:
        """The plan over these timesteps; corrections hold for those alone that they were measured at."""
        return self if timesteps == self.timesteps else replace(self, timesteps=timesteps, output_corrections=())


def plan_from_json(data: Any, where: str = "plan") -> SamplingPlan:
    raw = known(SamplingPlan, data, where)
    with reading(where):
        return SamplingPlan(
            solver=str(raw["solver"]),
            timesteps=floats(raw["timesteps"]),
            guidance=float(raw["guidance"]),
            eta=float(raw["eta"]),
            clip=boolean(raw["clip"]),
            end=None if raw.get("end") is None else float(raw["end"]),
            output_corrections=tuple(_correction(entry, where) for entry in raw.get("output_corrections", ())),
            start=str(raw.get("start", STARTS[0])),
            threshold=None if raw.get("threshold") is None else _threshold(raw["threshold"], where),
            guidance_interval=None if raw.get("guidance_interval") is None else _interval(raw["guidance_interval"]),
            guidance_rescale=float(raw.get("guidance_rescale", 0.0)),
        )


def _correction(data: Any, where: str) -> OutputCorrection:
    raw = known(OutputCorrection, data, where)
    return OutputCorrection(float(raw["slope"]), floats(raw["bias"]))


def _threshold(data: Any, where: str) -> Threshold:
    raw = known(Threshold, data, where)
    upper = raw.get("max")
    return Threshold(float(raw["ratio"]), None if upper is None else float(upper))


def _interval(values: Any) -> tuple[float, float | None]:
    low, high = values
    return float(low), None if high is None else float(high)


def plan_levels(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], end: float | None = None
) -> tuple[NoiseLevel, ...]:
    """The points at `timesteps`, and the clean end or that at the timestep `end`: one more point than steps."""
    return (*(noise_level_at(schedule, t) for t in timesteps), CLEAN if end is None else noise_level_at(schedule, end))


def make_plan(
    solver: str,
    steps: int,
    schedule: NoiseSchedule,
    *,
    spacing: str = "trailing",
    guidance: float = 1.0,
    eta: float = 0.0,
    clip: bool = True,
    end: float | None = None,
) -> SamplingPlan:
    """A plan that visits `steps` timesteps of the spacing `spacing`; raises InvalidInputError as `timesteps_for` and `SamplingPlan` do."""
    return SamplingPlan(solver, timesteps_for(spacing, steps, schedule), guidance=guidance, eta=eta, clip=clip, end=end)
