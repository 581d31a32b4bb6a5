"""`trajectory`: the student's own few steps learn to keep to the teacher's fine trajectory (SFD, Zhou et al. 2024).

With t_0 > ... > t_N = clean the student's timesteps, y_i the teacher's states there, made by a fine solver from the
same noise, and x_i the student's own states, x_0 = y_0 and x_i+1 = step(x_i) (few_steps.py),

    L = |step(x_j) - y_j+1|_1 / (alpha' - alpha sigma' / sigma)       at a step j drawn anew each time

Since the student is trained from where its own steps led it, it learns to mend what they did wrong. The divisor is what
an error of x_0 is multiplied with in the step, so that all steps count alike. Guidance of the plan is in the teacher's
paths: the student needs none. No images are used. One student may learn several N: each batch is of one step of one
of them, and no two share a timestep (few_steps.plans_apart).
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import guidance_in
from diffpress.compress.distillation.config import TrajectoryConfig
from diffpress.compress.distillation.few_steps import (
    implied_x0,
    place,
    plans_apart,
    predicted_x0,
    refined,
    student_spec,
    transfer,
)
from diffpress.compress.distillation.student import trained
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors
from diffpress.compress.training.teacher_trajectories import TeacherTrajectories
from diffpress.runtime.sampling_plan import plan_levels

SEED = 4_000_000  # far from the seeds that people sample, calibrate and evaluate with


def trajectory(checkpoint: Checkpoint, config: TrajectoryConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model to sample in `config.sample_steps` steps of Euler; returns it with that plan."""
    spec = checkpoint.spec
    own, *others = plans_apart((config.sample_steps, *config.other_steps), spec.schedule)
    stops = tuple(sorted({t for timesteps in (own, *others) for t in timesteps}, reverse=True))
    fine, kept = refined(ctx.teacher.spec.plan, stops, config.trajectory_steps, spec.schedule)
    fine = replace(fine, guidance=guidance_in(checkpoint))
    ctx.notes["guidance"] = fine.guidance
    paths = TeacherTrajectories(
        ctx.teacher, fine, kept, config.trajectories, ctx.conditions(config.trajectories), SEED, ctx.work.parent
    )
    paths.make()
    spec = student_spec(spec, config.kind, "euler", own, tuple(others))
    levels = plan_levels(spec.schedule, stops)
    # where each plan stops, as numbers of `levels` and of a path's states; and every step of it with those before
    routes = [(*(stops.index(t) for t in timesteps), len(stops)) for timesteps in (own, *others)]
    ways = [route[: end + 1] for route in routes for end in range(1, len(route))]

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor, Tensors, tuple[int, ...]]:
        states, conditions = paths.batch(config.batch, generator)
        return states, conditions, ways[int(torch.randint(0, len(ways), (), generator=generator))]

    def loss(student: nn.Module, states: torch.Tensor, conditions: Tensors, way: tuple[int, ...]) -> torch.Tensor:
        x = states[:, way[0]]
        places = [place(levels, number, x) for number in way]
        with torch.no_grad():
            for here, there in itertools.pairwise(places):
                x = transfer(x, predicted_x0(student, spec, x, here, conditions), here, there)
        here, there = places[-2:]
        # one step leads from x to both: their distance is that of the images they imply
        wanted = implied_x0(x, states[:, way[-1]], here, there)
        return torch.mean(torch.abs(predicted_x0(student, spec, x, here, conditions) - wanted))

    student = trained(checkpoint.evolve(spec=spec), Objective(draw, loss), config, ctx)
    return checkpoint.evolve(model=student, spec=spec)
