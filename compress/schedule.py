"""The `schedule` stage: choose the solver and the timesteps the model is sampled with. Weights stay as they are."""

from __future__ import annotations

from compress.checkpoint import Checkpoint
from compress.config import ScheduleConfig
from compress.context import Context, say
from runtime.schedule import make_plan


def schedule(checkpoint: Checkpoint, config: ScheduleConfig, ctx: Context) -> Checkpoint:
    """Give the checkpoint's spec a new plan."""
    old = checkpoint.spec.plan
    plan = make_plan(
        config.solver,
        config.steps,
        checkpoint.spec.schedule,
        grid=config.grid,
        guidance=config.guidance,
        eta=config.eta,
        clip=old.clip,
    )
    say(f"plan {old.solver} {old.steps} steps -> {plan.solver} {plan.steps} steps ({config.grid})")
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))
