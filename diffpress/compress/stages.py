"""The stages of a run as typed objects: what a recipe's entry says, checked when it is made.

Each is the configuration of one stage, so its arguments are the keys that a recipe may use.
"""

from __future__ import annotations

from typing import Any, Literal, cast

from pydantic import ValidationError

from diffpress.compress.config import Config
from diffpress.compress.distillation.config import (
    ConsistencyConfig,
    DistillConfig,
    GuidanceConfig,
    ProgressiveConfig,
    RecoverConfig,
    ScoreConfig,
    TrajectoryConfig,
)
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.quantization.config import FormatName, QuantizeConfig
from diffpress.compress.recipe import check_keys, first_error
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.runtime.errors import InvalidInputError


class _Stage:
    """Base of the stage objects: wrong settings raise InvalidInputError, as they do in a recipe."""

    def __init__(self, **settings: Any) -> None:
        name, kind = f"diffpress.{type(self).__name__}", cast(type[Config], type(self))
        check_keys(kind, settings, name, stage_name(self))
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise first_error(error, name) from error


class Schedule(_Stage, ScheduleConfig):
    """Choose the solver and the timesteps that the model is sampled with; weights stay as they are.

    Examples:
        >>> import diffpress as dp
        >>> dp.Schedule(solver="unipc_2", steps=8).solver
        'unipc_2'
    """


class Prune(_Stage, PruneConfig):
    """Remove the fraction `ratio` of channels and attention heads.

    Examples:
        >>> import diffpress as dp
        >>> dp.Prune(ratio=0.3).method
        'taylor'
    """


class Recover(_Stage, RecoverConfig):
    """Train a pruned model to reproduce the model it was pruned from.

    Examples:
        >>> import diffpress as dp
        >>> dp.Recover(steps=2000).steps
        2000
    """


class Guidance(_Stage, GuidanceConfig):
    """Train one evaluation to replace the two of classifier-free guidance.

    Examples:
        >>> import diffpress as dp
        >>> dp.Guidance(weight=7.5).kind
        'guidance'
    """

    kind: Literal["guidance"] = "guidance"


class Progressive(_Stage, ProgressiveConfig):
    """Halve the number of steps repeatedly (progressive distillation).

    Examples:
        >>> import diffpress as dp
        >>> dp.Progressive(start_steps=16, sample_steps=2).sample_steps
        2
    """

    kind: Literal["progressive"] = "progressive"


class Trajectory(_Stage, TrajectoryConfig):
    """Train a few steps to follow the teacher's fine trajectory (SFD).

    Examples:
        >>> import diffpress as dp
        >>> dp.Trajectory(sample_steps=4).kind
        'trajectory'
    """

    kind: Literal["trajectory"] = "trajectory"


class Consistency(_Stage, ConsistencyConfig):
    """Train every point of a trajectory to map to the same image (ECT).

    Examples:
        >>> import diffpress as dp
        >>> dp.Consistency(sample_steps=2).kind
        'consistency'
    """

    kind: Literal["consistency"] = "consistency"


class Score(_Stage, ScoreConfig):
    """Train a few-step generator by the difference of two scores (DMD2 without its GAN).

    Examples:
        >>> import diffpress as dp
        >>> dp.Score(sample_steps=1).kind
        'score'
    """

    kind: Literal["score"] = "score"


class Quantize(_Stage, QuantizeConfig):
    """Quantize weights and activations to `format`, calibrated on the model's own trajectory.

    Examples:
        >>> import diffpress as dp
        >>> dp.Quantize("int8", samples=16).format
        'int8'
    """

    def __init__(self, format: FormatName = "int8", **settings: Any) -> None:
        super().__init__(format=format, **settings)


# configuration class -> name of the stage in a recipe
STAGE_NAMES: dict[type[Config], str] = {
    ScheduleConfig: "schedule",
    PruneConfig: "prune",
    DistillConfig: "distill",
    QuantizeConfig: "quantize",
}


def stage_name(config: object) -> str:
    """Return the recipe's name of a stage object; InvalidInputError for anything that is no stage."""
    for kind, name in STAGE_NAMES.items():
        if isinstance(config, kind):
            return name
    raise InvalidInputError(f"stages: {config!r} is no stage; use diffpress.Prune(...), Quantize(...) and so on")
