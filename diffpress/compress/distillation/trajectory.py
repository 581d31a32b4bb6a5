"""`trajectory`: train a few-step student on the teacher's fine trajectory (SFD, Zhou et al. 2024).

Let t_0 > ... > t_N = clean be the student's timesteps, y_i the teacher's states there, computed by a fine solver from
the same noise, and x_i the student's own states, x_0 = y_0 and x_i+1 = step(x_i) (few_steps.py). The loss is

    L = |step(x_j) - y_j+1|_1 / (alpha' - alpha sigma' / sigma)       at a random step j

The student starts from its own state x_j, so it learns to correct the errors of its earlier steps. The divisor is the
factor of x_0 in the step, so that an error of x_0 weighs the same at all steps. The teacher's trajectories include the
guidance of the plan, and the student needs none. No images are used. One student can learn several N: each batch
trains one step of one of them, and no two plans share a timestep (few_steps.disjoint_timesteps).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import effective_guidance
from diffpress.compress.distillation.config import TrajectoryConfig
from diffpress.compress.distillation.few_steps import (
    disjoint_timesteps,
    expand_level,
    predict_x0,
    refine_plan,
    student_spec,
)
from diffpress.compress.distillation.student import train_student
from diffpress.compress.seeds import DISTILLATION_SEED
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors
from diffpress.compress.training.teacher_trajectories import TeacherTrajectories
from diffpress.runtime.parameterization import implied_x0, transfer
from diffpress.runtime.sampling_plan import plan_levels


def trajectory(checkpoint: Checkpoint, config: TrajectoryConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model to sample in `config.sample_steps` Euler steps, and set that plan."""
    spec = checkpoint.spec
    own, *others = disjoint_timesteps((config.sample_steps, *config.other_steps), spec.schedule)
    stops = tuple(sorted({t for timesteps in (own, *others) for t in timesteps}, reverse=True))
    fine, kept = refine_plan(ctx.teacher.spec.plan, stops, config.trajectory_steps, spec.schedule)
    weight = ctx.notes["guidance"] = effective_guidance(spec)
    fine = replace(fine, guidance=weight)
    teacher_trajectories = TeacherTrajectories(
        ctx.teacher,
        fine,
        kept,
        config.trajectories,
        ctx.conditions(config.trajectories),
        DISTILLATION_SEED,
        ctx.samples,
    )
    teacher_trajectories.generate()
    spec = student_spec(replace(spec, baked_in_guidance=weight), config.kind, "euler", own, tuple(others))
    levels = plan_levels(spec.schedule, stops)
    # each plan as indices into `levels` and the stored states; `prefixes` are each of its steps with those before it
    routes = [(*(stops.index(t) for t in timesteps), len(stops)) for timesteps in (own, *others)]
    prefixes = [indices[: stop_index + 1] for indices in routes for stop_index in range(1, len(indices))]

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor, Tensors, tuple[int, ...]]:
        states, conditions = teacher_trajectories.batch(config.batch, generator)
        return states, conditions, prefixes[int(torch.randint(0, len(prefixes), (), generator=generator))]

    def loss(student: nn.Module, states: torch.Tensor, conditions: Tensors, route: tuple[int, ...]) -> torch.Tensor:
        x = states[:, route[0]]
        step_levels = [expand_level(levels, level_index, x) for level_index in route]
        with torch.no_grad():
            for start, end in itertools.pairwise(step_levels[:-1]):
                x = transfer(x, predict_x0(student, spec, x, start, conditions), start, end)
        start, end = step_levels[-2:]
        # comparing the x_0 implied by both end states includes the division in L
        target = implied_x0(x, states[:, route[-1]], start, end)
        return torch.mean(torch.abs(predict_x0(student, spec, x, start, conditions) - target))

    student = train_student(checkpoint.evolve(spec=spec), Objective(draw, loss), config, ctx)
    return checkpoint.evolve(model=student, spec=spec)
