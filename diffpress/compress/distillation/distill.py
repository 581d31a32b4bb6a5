"""The `distill` stage: train the weights to recover quality or to need fewer evaluations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import DistillConfig
from diffpress.compress.distillation.consistency import consistency
from diffpress.compress.distillation.guidance import guidance
from diffpress.compress.distillation.progressive import progressive
from diffpress.compress.distillation.recover import recover
from diffpress.compress.distillation.score import score
from diffpress.compress.distillation.trajectory import trajectory

KINDS: dict[str, Callable[[Checkpoint, Any, Context], Checkpoint]] = {
    "recover": recover,
    "guidance": guidance,
    "progressive": progressive,
    "trajectory": trajectory,
    "consistency": consistency,
    "score": score,
}


def distill(checkpoint: Checkpoint, config: DistillConfig, ctx: Context) -> Checkpoint:
    """Train a copy of the checkpoint's model by `config.kind`; some kinds also change the plan."""
    student = KINDS[config.kind](checkpoint, config, ctx)
    ctx.teacher.model.to("cpu")  # training moved it to the student's device
    return student
