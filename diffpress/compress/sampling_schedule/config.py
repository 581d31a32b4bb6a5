"""Settings of the `schedule` stage: the keys of `schedule: {...}` in a recipe."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from diffpress.compress.config import Config, StageConfig
from diffpress.runtime.caching.cacheable import check_cacheable
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.timesteps import SPACINGS


class StepCacheConfig(Config):
    """Leave evaluations out of the plan: which ones is measured (compress/sampling_schedule/step_cache.py)."""

    kind: Literal["forecast", "features", "auto"] = Field(
        "forecast",
        description="What replaces an evaluation: forecast predicts the network's output, features evaluates its outer "
        "layers, auto takes the better one.",
    )
    speedup: float | None = Field(
        None, gt=1.0, description="How many times less time the steps take; give this or max_error_db."
    )
    max_error_db: float | None = Field(
        None,
        lt=0.0,
        description="Largest error of the samples against those without a cache, in dB: -20 is a hundredth of their "
        "power. The fewest evaluations within it are taken.",
    )
    order: Literal[0, 1, 2] | None = Field(None, description="Order of the forecast; None chooses it.")
    cut: str | None = Field(
        None, description="Where kind features splits the network, a name of its family; None takes the outermost one."
    )
    engine: Literal["onnxruntime", "openvino"] = Field(
        "onnxruntime", description="Engine that kind features is timed in."
    )
    samples: int = Field(32, ge=2, description="Number of trajectories the search uses.")
    batch: int = Field(32, ge=1, description="Samples per batch of the search.")
    refine: int = Field(1, ge=0, description="Rounds of moving single evaluations to a neighboring step.")

    @model_validator(mode="after")
    def _one_target_is_given(self) -> StepCacheConfig:
        if (self.speedup is None) == (self.max_error_db is None):
            raise ValueError("give speedup or max_error_db, one of them")
        if self.kind == "forecast" and self.cut is not None:
            raise ValueError("cut: only used by kind features; leave it out")
        if self.kind == "features" and self.order is not None:
            raise ValueError("order: only used by kind forecast; leave it out")
        return self


class ScheduleConfig(StageConfig):
    """Choose the sampling plan that all later stages and the bundle use; the weights are unchanged.

    Spacing and guidance settings left at None keep the model's own. `search` optimizes the timesteps
    (compress/sampling_schedule/search.py), `cache` leaves evaluations out.

    Examples:
        >>> import diffpress as dp
        >>> dp.Schedule(solver="unipc_2", steps=8).solver
        'unipc_2'
    """

    renamed: ClassVar[dict[str, str]] = {"grid": "spacing"}

    solver: Literal[tuple(SOLVERS)] = Field("dpmpp_2m", description="Solver of the sampling plan.")  # type: ignore[valid-type]
    steps: int = Field(10, ge=1, description="Number of sampling steps.")
    spacing: Literal[tuple(SPACINGS)] | None = Field(  # type: ignore[valid-type]
        None, description="Timestep spacing; None keeps the model's."
    )
    timesteps: tuple[float, ...] | None = Field(
        None, description="Explicit timesteps, in descending order; excludes steps, spacing and search."
    )
    guidance: float | None = Field(None, description="Classifier-free guidance scale; None keeps the model's.")
    guidance_interval: tuple[float, float | None] | None = Field(
        None,
        description="[low, high]: guide where low < sigma / alpha <= high (None: no limit). None keeps the model's.",
    )
    guidance_rescale: float | None = Field(
        None, ge=0.0, le=1.0, description="Rescale factor of guided outputs (phi), 0 to 1; None keeps the model's."
    )
    threshold: float | None = Field(
        None, gt=0.0, le=1.0, description="Quantile of |x_0| for dynamic thresholding; None keeps the model's setting."
    )
    eta: float = Field(0.0, ge=0.0, le=1.0, description="DDIM's eta, 0 (deterministic) to 1: share of fresh noise.")
    search: Literal["gits"] | None = Field(None, description="Search method for the timesteps; None disables it.")
    refine: int = Field(0, ge=0, description="Rounds of pattern search that refine the searched timesteps.")
    samples: int = Field(64, ge=2, description="Number of trajectories the search uses.")
    fine: int = Field(60, ge=4, description="Steps of the fine reference trajectories of the search.")
    batch: int = Field(32, ge=1, description="Samples per batch of the search.")

    cache: StepCacheConfig | None = Field(None, description="Step cache; None evaluates the network in every step.")

    @model_validator(mode="after")
    def _solver_can_be_cached(self) -> ScheduleConfig:
        if self.cache is not None:
            try:
                check_cacheable(self.solver, self.eta, "cache")
            except InvalidInputError as error:
                raise ValueError(str(error)) from error
        return self

    @model_validator(mode="after")
    def _timesteps_have_one_source(self) -> ScheduleConfig:
        # a key with its default is not refused: a resolved recipe has every key
        fields = type(self).model_fields
        changed = {name for name in self.model_fields_set if getattr(self, name) != fields[name].default}
        if self.timesteps is not None:
            taken = {"steps", "spacing", "search"} & changed
            if taken:
                raise ValueError(f"timesteps is set explicitly: remove {', '.join(sorted(taken))}")
        if self.search is None:
            idle = {"refine", "samples", "fine", "batch"} & changed
            if idle:
                raise ValueError(f"{', '.join(sorted(idle))}: only used by a search; set search: gits")
        elif SOLVERS[self.solver].noisy or self.eta > 0:
            raise ValueError(
                f"search: {self.solver} with eta {self.eta:g} adds noise; use a deterministic solver, eta 0"
            )
        elif self.fine <= self.steps:
            raise ValueError(f"search: fine {self.fine} must be greater than steps {self.steps}")
        return self
