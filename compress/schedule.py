"""The `schedule` stage: choose the solver and the timesteps the model is sampled with. Weights stay as they are."""

from __future__ import annotations

from dataclasses import replace

from compress.checkpoint import Checkpoint
from compress.config import ScheduleConfig
from compress.context import Context, say
from runtime.schedule import spaced_timesteps
from runtime.solvers import CLIPPING
from runtime.spec import Plan


def schedule(checkpoint: Checkpoint, config: ScheduleConfig, ctx: Context) -> Checkpoint:
    """Give the checkpoint's spec a new plan; a grid keeps the shift that a flow model came with."""
    spec, old = checkpoint.spec, checkpoint.spec.plan
    spacing = spec.spacing if config.grid is None else replace(spec.spacing, grid=config.grid, offset=0)
    plan = Plan(
        config.solver,
        spaced_timesteps(spacing, config.steps, spec.schedule, spec.tokens(spec.sample_shape)),
        guidance=old.guidance if config.guidance is None else config.guidance,
        eta=config.eta,
        clip=(old.clip or old.solver == CLIPPING) and config.solver != CLIPPING,
        # where to end belongs to the solver the checkpoint came with
        end=old.end if config.solver == old.solver else None,
    )
    say(f"plan {old.solver} {old.steps} steps -> {plan.solver} {plan.steps} steps ({spacing.grid})")
    return checkpoint.evolve(spec=replace(spec, plan=plan, spacing=spacing))
