"""The `distill` stage: train the weights to recover quality or to need fewer evaluations. One table of the kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffpress.compress.config import union_by_kind
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
from diffpress.runtime.errors import InvalidInputError

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
        same_prediction: Whether outputs of student and teacher are compared, which must then be of one prediction type.
    """

    config: type[DistillConfig]
    run: Callable[[Checkpoint, Any, Context], Checkpoint]
    few_step: bool = False
    same_prediction: bool = False


_HERE = "diffpress.compress.distillation"
KINDS: dict[str, DistillDef] = {
    "recover": DistillDef(RecoverConfig, lazy(f"{_HERE}.recover:recover"), same_prediction=True),
    "guidance": DistillDef(GuidanceConfig, lazy(f"{_HERE}.guidance:guidance"), same_prediction=True),
    "progressive": DistillDef(ProgressiveConfig, lazy(f"{_HERE}.progressive:progressive"), few_step=True),
    "trajectory": DistillDef(TrajectoryConfig, lazy(f"{_HERE}.trajectory:trajectory"), few_step=True),
    "consistency": DistillDef(ConsistencyConfig, lazy(f"{_HERE}.consistency:consistency"), few_step=True),
    "score": DistillDef(ScoreConfig, lazy(f"{_HERE}.score:score"), few_step=True, same_prediction=True),
}
DEFAULT_KIND = "recover"

# settings of any kind
AnyDistillConfig: Any = union_by_kind([entry.config for entry in KINDS.values()], DEFAULT_KIND)


def distill(checkpoint: Checkpoint, config: DistillConfig, ctx: Context) -> Checkpoint:
    """Train a copy of the checkpoint's model by `config.kind`; some kinds also change the plan.

    Raises:
        InvalidInputError: The kind compares outputs, and teacher and student predict different quantities.
    """
    teacher, own = ctx.teacher.spec.prediction, checkpoint.spec.prediction
    if KINDS[config.kind].same_prediction and teacher != own:
        raise InvalidInputError(
            f"distill: {{kind: {config.kind}}}: the teacher predicts {teacher}, the student {own}; place this stage "
            "before the one that changed the prediction"
        )
    student = KINDS[config.kind].run(checkpoint, config, ctx)
    ctx.teacher.model.to("cpu")  # training moved it to the student's device
    return student
