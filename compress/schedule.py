"""The `schedule` stage: choose the solver and the timesteps the model is sampled with. Weights stay as they are."""

from __future__ import annotations

from dataclasses import replace

from compress.checkpoint import Checkpoint
from compress.config import ScheduleConfig
from compress.context import Context, say
from runtime.schedule import spaced_timesteps
from runtime.solvers import with_solver


def schedule(checkpoint: Checkpoint, config: ScheduleConfig, ctx: Context) -> Checkpoint:
    """Give the checkpoint's spec a new plan; a grid keeps the shift that a flow model came with."""
    spec, old = checkpoint.spec, checkpoint.spec.plan
    spacing = spec.spacing if config.grid is None else replace(spec.spacing, grid=config.grid, offset=0)
    plan = replace(
        with_solver(old.uncorrected, config.solver),
        timesteps=spaced_timesteps(spacing, config.steps, spec.schedule, spec.tokens(spec.sample_shape)),
        guidance=old.guidance if config.guidance is None else config.guidance,
        eta=config.eta,
    )
    say(f"plan {old.solver} {old.steps} steps -> {plan.solver} {plan.steps} steps ({spacing.grid})")
    return checkpoint.evolve(spec=replace(spec, plan=plan, spacing=spacing))
