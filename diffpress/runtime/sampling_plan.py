"""The sampling plan: solver, timesteps, guidance, corrections and step cache that a model is sampled with.

The levels of a plan are those at its descending timesteps, followed by the end: clean data, alpha = 1 and sigma = 0
(diffusers' `set_alpha_to_one`, `final_sigmas_type="zero"`), or the noise level of the timestep `end`. Some schedulers
of diffusers pass the network a timestep that is not that of the noise level (`ratios`), or end a step at another level
than the next one starts from (`stride`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from diffpress.runtime.caching.step_cache import StepCache, step_cache_from_json
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.json_fields import boolean, check_fields, convert_errors, floats, without_defaults
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel, NoiseSchedule, noise_level_at, noise_level_of_ratio
from diffpress.runtime.spaced_timesteps import space
from diffpress.runtime.timesteps import TimestepSpacing, timesteps_for

STARTS = ("marginal", "noise", "unit")


@dataclass(frozen=True)
class OutputCorrection:
    """Correction of the mean quantization error of the output at one timestep: (out - bias[channel]) / (1 + slope)."""

    slope: float
    bias: tuple[float, ...]

    def __post_init__(self) -> None:
        if not (np.isfinite(self.slope) and self.slope > -1.0 and np.isfinite(self.bias).all()):
            raise InvalidInputError(
                f"plan: a correction's slope {self.slope:g} must lie above -1, and its slope and bias must be finite"
            )


@dataclass(frozen=True)
class Threshold:
    """Dynamic thresholding (Saharia et al. 2022, Imagen, section 2.3): x_0 is clipped to -s..s and divided by s.

    s is the `ratio` quantile of |x_0| of each sample, at least 1 and at most `max` (None: no limit), for data in -1..1.
    """

    ratio: float = 0.995
    max: float | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.ratio <= 1.0 or not (self.max is None or (np.isfinite(self.max) and self.max >= 1.0)):
            raise InvalidInputError(
                f"threshold: ratio {self.ratio:g} must lie in (0, 1], and max {self.max} must be at least 1"
            )


@dataclass(frozen=True)
class SamplingPlan:
    """How a model is sampled.

    Attributes:
        solver: Name of the solver.
        timesteps: Descending timesteps, integer or fractional; two may be equal only if `ratios` are given.
        guidance: Classifier-free guidance weight w of uncond + w (cond - uncond). 1 or less disables guidance, as in
            diffusers, and takes one evaluation per step instead of two.
        eta: Share of fresh noise in DDIM.
        clip: Clip the predicted x_0 to the data range in every step.
        end: Timestep at whose noise level the last step ends; None for clean data. Some checkpoints end at timestep 0
            (diffusers' `set_alpha_to_one: false`).
        output_corrections: Corrections of a quantized network's output, one per timestep or none (PTQD, He et al.
            2023).
        start: Standard deviation of the initial noise: 'marginal' for that of noised data, 'noise' for sigma, 'unit'
            for 1. They differ by parts in a thousand.
        threshold: Dynamic thresholding of x_0, instead of clipping.
        guidance_interval: (low, high): guidance applies where low < sigma / alpha <= high, and other steps take one
            evaluation (Kynkaanniemi et al. 2024). A `high` of None means no upper end.
        guidance_rescale: phi of Lin et al. 2024, eq. 15-16: how far the guided output is rescaled to the standard
            deviation of the cond half.
        ratios: sigma / alpha at each timestep, strictly descending, if it is not that of the noise schedule.
        stride: Each step ends at the noise level this many timesteps lower, whatever the next timestep, and below 0 at
            the plan's end (diffusers' DDIM); 0 for steps that end where the next one starts.
        cache: What each step evaluates, if not always the whole network.

    Examples:
        >>> import diffpress as dp
        >>> dp.SamplingPlan("ddim", (900.0, 500.0, 100.0), guidance=3.0).steps
        3
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
    ratios: tuple[float, ...] = ()
    stride: int = 0
    cache: StepCache | None = None

    def __post_init__(self) -> None:
        if not (_is_falling(self.timesteps, strictly=not self.ratios) and self.timesteps):
            raise InvalidInputError(
                "plan: timesteps must be one or more finite, non-negative, strictly descending numbers"
            )
        if self.ratios and not (_is_falling(self.ratios) and len(self.ratios) == self.steps):
            raise InvalidInputError(
                "plan: ratios must be finite, non-negative, strictly descending numbers, one for each timestep"
            )
        if self.stride < 0:
            raise InvalidInputError(f"plan: stride {self.stride} must not be negative")
        if not (np.isfinite(self.guidance) and np.isfinite(self.eta) and 0.0 <= self.eta <= 1.0):
            raise InvalidInputError(
                f"plan: guidance {self.guidance} must be finite, and eta {self.eta} must lie in [0, 1]"
            )
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
        if self.end is not None and not 0.0 <= self.end <= self.timesteps[-1]:
            raise InvalidInputError(
                f"plan: end {self.end} must be a timestep not above the last one, {self.timesteps[-1]:g}"
            )
        if self.output_corrections and len(self.output_corrections) != self.steps:
            raise InvalidInputError(
                f"plan: {len(self.output_corrections)} output corrections for {self.steps} timesteps; use one each or "
                "none"
            )
        if self.cache is not None and len(self.cache.steps) != self.steps:
            raise InvalidInputError(
                f"plan: cache: {len(self.cache.steps)} entries for {self.steps} timesteps; give one each"
            )
        if self.cache is not None and self.cache.kind == "features" and self.guidance_interval is not None:
            raise InvalidInputError(
                "plan: cache: kind 'features' needs the same rows in every step, and guidance_interval changes them; "
                "use kind 'forecast', or remove the interval"
            )

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    @property
    def without_corrections(self) -> SamplingPlan:
        """The plan without output corrections, for any network but the one they were measured on."""
        return replace(self, output_corrections=())

    @property
    def without_cache(self) -> SamplingPlan:
        """The plan that evaluates the whole network in every step, for which no correction of a cached one holds."""
        if self.cache is None or self.cache.is_idle:
            return replace(self, cache=None)
        return replace(self, cache=None, output_corrections=())

    def over(self, timesteps: tuple[float, ...]) -> SamplingPlan:
        """Return the plan with these timesteps; output corrections and step cache are dropped if they change.

        Timesteps of the plan keep their ratios. With any other timestep all ratios are those of the noise schedule.
        """
        if timesteps == self.timesteps:
            return self
        known = dict(zip(self.timesteps, self.ratios, strict=False))
        ratios = tuple(known[t] for t in timesteps) if set(timesteps) <= set(known) else ()
        return replace(self, timesteps=timesteps, ratios=ratios, stride=0, output_corrections=(), cache=None)

    def spaced(
        self, spacing: TimestepSpacing, steps: int, schedule: NoiseSchedule, tokens: int | None = None
    ) -> SamplingPlan:
        """Return the plan over `steps` timesteps of this spacing, see `diffpress.runtime.spaced_timesteps.space`."""
        found = space(spacing, steps, schedule, tokens)
        plain = replace(self, output_corrections=(), cache=None)
        plan = replace(plain, timesteps=found.timesteps, ratios=found.ratios, stride=found.stride)
        return self if plan == plain else plan

    def to_json(self) -> dict[str, Any]:
        """Return the plan as JSON-serializable data; `ratios`, `stride` and `cache` are entries only if in use."""
        return without_defaults(self, ("ratios", "stride", "cache"))


def _is_falling(values: tuple[float, ...], strictly: bool = True) -> bool:
    """Whether the values are finite, not negative, and descending."""
    array = np.asarray(values, dtype=float)
    steps = np.diff(array)
    return bool(np.isfinite(array).all() and (array >= 0).all() and (steps < 0 if strictly else steps <= 0).all())


def plan_from_json(data: Any, where: str = "plan") -> SamplingPlan:
    """Read a sampling plan from its JSON form.

    Raises:
        InvalidInputError: An entry is missing, unknown or of the wrong type; the message starts with `where`.
    """
    raw = check_fields(SamplingPlan, data, where)
    with convert_errors(where):
        return SamplingPlan(
            solver=str(raw["solver"]),
            timesteps=floats(raw["timesteps"]),
            guidance=float(raw["guidance"]),
            eta=float(raw["eta"]),
            clip=boolean(raw["clip"]),
            end=None if raw.get("end") is None else float(raw["end"]),
            output_corrections=tuple(_correction(entry, where) for entry in raw.get("output_corrections", ())),
            start=str(raw.get("start", STARTS[0])),
            threshold=None if raw.get("threshold") is None else threshold_from_json(raw["threshold"], where),
            guidance_interval=None if raw.get("guidance_interval") is None else _interval(raw["guidance_interval"]),
            guidance_rescale=float(raw.get("guidance_rescale", 0.0)),
            ratios=floats(raw.get("ratios", ())),
            stride=int(raw.get("stride", 0)),
            cache=None if raw.get("cache") is None else step_cache_from_json(raw["cache"], f"{where}.cache"),
        )


def _correction(data: Any, where: str) -> OutputCorrection:
    raw = check_fields(OutputCorrection, data, where)
    return OutputCorrection(float(raw["slope"]), floats(raw["bias"]))


def threshold_from_json(data: Any, where: str) -> Threshold:
    """Read dynamic thresholding from its JSON form."""
    raw = check_fields(Threshold, data, where)
    upper = raw.get("max")
    return Threshold(float(raw["ratio"]), None if upper is None else float(upper))


def _interval(values: Any) -> tuple[float, float | None]:
    low, high = values
    return float(low), None if high is None else float(high)


def plan_levels(
    schedule: NoiseSchedule, timesteps: tuple[float, ...], end: float | None = None
) -> tuple[NoiseLevel, ...]:
    """Return the noise levels at `timesteps`, followed by that at `end` or by clean data: one more than steps."""
    return (*(noise_level_at(schedule, t) for t in timesteps), CLEAN if end is None else noise_level_at(schedule, end))


def plan_steps(schedule: NoiseSchedule, plan: SamplingPlan) -> tuple[tuple[NoiseLevel, NoiseLevel], ...]:
    """Return the noise levels at which each step of the plan starts and ends."""
    ratios = plan.ratios or (None,) * plan.steps
    starts = [
        noise_level_at(schedule, t) if ratio is None else noise_level_of_ratio(schedule, t, ratio)
        for t, ratio in zip(plan.timesteps, ratios, strict=True)
    ]
    end = CLEAN if plan.end is None else noise_level_at(schedule, plan.end)
    if plan.stride:
        lower = [t - plan.stride for t in plan.timesteps]
        return tuple(zip(starts, (noise_level_at(schedule, t) if t >= 0 else end for t in lower), strict=True))
    return tuple(zip(starts, [*starts[1:], end], strict=True))


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
    """Return a plan over `steps` integer timesteps of the given spacing.

    Raises:
        InvalidInputError: Unknown spacing, an impossible number of steps, or invalid options (see `SamplingPlan`).

    Examples:
        >>> import diffpress as dp
        >>> dp.make_plan("dpmpp_2m", 4, dp.flow_schedule(1000)).timesteps
        (999.0, 749.0, 499.0, 249.0)
    """
    return SamplingPlan(solver, timesteps_for(spacing, steps, schedule), guidance=guidance, eta=eta, clip=clip, end=end)
