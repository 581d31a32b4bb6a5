"""The `distill` stage: train the weights to recover quality or to need fewer evaluations. One table of the kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Union

from pydantic import BeforeValidator, Field

from diffpress.compress.distillation.config import (
    ConsistencyConfig,
    DistillConfig,
    GuidanceConfig,
    ProgressiveConfig,
    RecoverConfig,
    ScoreConfig,
    TrajectoryConfig,
)
from diffpress.compress.lazy import lazy

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.context import Context


@dataclass(frozen=True)
class DistillDef:
    """One kind of distillation.

    Attributes:
        config: Its settings; the field `kind` has the kind's name as its default.
        run: (checkpoint, config, context) -> student.
        few_step: Whether its students can be sampled only under the plans they were trained for.
    """

    config: type[DistillConfig]
    run: Callable[[Checkpoint, Any, Context], Checkpoint]
    few_step: bool = False


_HERE = "diffpress.compress.distillation"
KINDS: dict[str, DistillDef] = {
    "recover": DistillDef(RecoverConfig, lazy(f"{_HERE}.recover:recover")),
    "guidance": DistillDef(GuidanceConfig, lazy(f"{_HERE}.guidance:guidance")),
    "progressive": DistillDef(ProgressiveConfig, lazy(f"{_HERE}.progressive:progressive"), few_step=True),
    "trajectory": DistillDef(TrajectoryConfig, lazy(f"{_HERE}.trajectory:trajectory"), few_step=True),
    "consistency": DistillDef(ConsistencyConfig, lazy(f"{_HERE}.consistency:consistency"), few_step=True),
    "score": DistillDef(ScoreConfig, lazy(f"{_HERE}.score:score"), few_step=True),
}
DEFAULT_KIND = "recover"


def _with_kind(settings: Any) -> Any:
    return {"kind": DEFAULT_KIND, **settings} if isinstance(settings, dict) else settings


# settings of any kind, discriminated by `kind`
AnyDistillConfig: Any = Annotated[
    Union[tuple(entry.config for entry in KINDS.values())],  # noqa: UP007 - the members are known at run time only
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]


def distill(checkpoint: Checkpoint, config: DistillConfig, ctx: Context) -> Checkpoint:
    """Train a copy of the checkpoint's model by `config.kind`; some kinds also change the plan."""
    student = KINDS[config.kind].run(checkpoint, config, ctx)
    ctx.teacher.model.to("cpu")  # training moved it to the student's device
    return student
