"""`progressive`: halve the number of steps repeatedly (progressive distillation, Salimans & Ho 2022).

In each halving one step of the student learns to replace two of the teacher. From x = alpha x_0 + sigma eps, with x_0
from the data, the teacher takes two deterministic steps to x'' (few_steps.py). With x_0~ the image for which a single
step leads there, the loss is

    x_0~ = (x'' - k x) / (alpha'' - k alpha),   k = sigma'' / sigma          L = max(SNR, 1) |x_0 - x_0~|^2

where x_0 is the student's (algorithm 2, "truncated SNR"). The student of each halving is the teacher of the next. At
pure noise an epsilon prediction does not determine the image, which few-step sampling needs there: a network that
predicts epsilon is first trained to predict v = (eps - sigma x) / alpha. The first halving includes the guidance of
the plan.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context, Data
from diffpress.compress.distillation.conditioning import effective_guidance, guided_output
from diffpress.compress.distillation.config import ProgressiveConfig
from diffpress.compress.distillation.few_steps import clip_x0, few_timesteps, gather_levels, student_spec
from diffpress.compress.distillation.student import train_student
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import NoiseLevelBatch, Tensors, add_noise, forward, noise_levels_at
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.parameterization import implied_x0, noise_in, to_output, to_x0, transfer
from diffpress.runtime.sampling_plan import plan_levels
from diffpress.runtime.spec import DenoiserSpec


def progressive(checkpoint: Checkpoint, config: ProgressiveConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model to sample in `config.sample_steps` steps, and set that plan."""
    data, schedule = data_for(ctx, config.samples), checkpoint.spec.schedule
    weight = ctx.notes["guidance"] = effective_guidance(checkpoint.spec)
    timesteps = few_timesteps(config.start_steps, schedule)
    own_spec = replace(checkpoint.spec, baked_in_guidance=weight)
    student = checkpoint.evolve(spec=student_spec(own_spec, config.kind, "ddim", timesteps))
    teacher, spec = ctx.teacher.model.eval(), ctx.teacher.spec
    if student.spec.prediction == "epsilon":
        student = student.evolve(spec=replace(student.spec, prediction="v"))
        loss = v_objective(teacher, spec, data, config.batch)
        student = student.evolve(model=train_student(student, loss, config, ctx, "to v"))
    while len(timesteps) > config.sample_steps:
        fine, timesteps = timesteps, timesteps[::2]
        student = student.evolve(spec=student.spec.with_plan(student.spec.plan.over(timesteps)))
        loss = _halving_objective(teacher, spec, data, fine, student.spec, weight, config.batch)
        student = student.evolve(
            model=train_student(student, loss, config, ctx, f"{len(fine)} to {len(timesteps)} steps")
        )
        teacher, spec, weight = student.model, student.spec, student.spec.plan.guidance
    return student


def _halving_objective(
    teacher: nn.Module,
    spec: DenoiserSpec,
    data: Data,
    fine: tuple[float, ...],
    own_spec: DenoiserSpec,
    weight: float,
    batch: int,
) -> Objective:
    """Return the objective of one halving.

    `spec`, `fine` timesteps and guidance `weight` are the teacher's, `own_spec` is the student's.
    """
    levels = plan_levels(spec.schedule, fine)

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(batch, generator)
        index = 2 * torch.randint(0, len(fine) // 2, (batch,), generator=generator)
        return x0, torch.randn(x0.shape, generator=generator), index, cond, data.uncond

    def loss(
        student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor, cond: Tensors, uncond: Tensors
    ) -> torch.Tensor:
        teacher.to(x0.device)
        here, middle, there = (gather_levels(levels, index + i, x0.dim() - 1) for i in range(3))
        x = here.alpha * x0 + here.sigma * noise
        with torch.no_grad():
            moved = x
            for a, b in ((here, middle), (middle, there)):
                moved = transfer(moved, _guided_x0(teacher, spec, moved, a, cond, uncond, weight), a, b)
        out = forward(student, own_spec, x, here.t, cond)
        student_x0 = to_x0(own_spec.prediction, x, out, here)
        snr = (here.alpha / here.sigma) ** 2
        return torch.mean(snr.clamp_min(1.0) * (student_x0 - implied_x0(x, moved, here, there)) ** 2)

    return Objective(draw, loss)


def _guided_x0(
    teacher: nn.Module,
    spec: DenoiserSpec,
    x: torch.Tensor,
    here: NoiseLevelBatch,
    cond: Tensors,
    uncond: Tensors,
    weight: float,
) -> torch.Tensor:
    out = guided_output(teacher, spec, x, here.t, cond, uncond, weight)
    return clip_x0(spec, to_x0(spec.prediction, x, out, here))


def v_objective(teacher: nn.Module, spec: DenoiserSpec, data: Data, batch: int) -> Objective:
    """Return the objective that trains a v prediction on an epsilon teacher, at all timesteps."""
    own_spec = replace(spec, prediction="v")
    bounded = spec.is_picture or (spec.is_pixel_space and spec.plan.clip)  # points and such may have no data range

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(batch, generator)
        t = torch.randint(0, len(spec.schedule), (batch,), generator=generator)
        return x0, torch.randn(x0.shape, generator=generator), t, cond

    def loss(student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        teacher.to(x0.device)
        x_t, level = add_noise(spec, x0, noise, t), noise_levels_at(spec, t)
        with torch.no_grad():
            eps = forward(teacher, spec, x_t, t, cond)
        # near pure noise a small error of epsilon is a large one of x_0: clip to the range of the data or batch
        image = to_x0(spec.prediction, x_t, eps, level)
        image = image.clamp(*spec.data_range) if bounded else image.clamp(x0.min(), x0.max())
        target = to_output("v", image, noise_in(x_t, image, level), level)
        return torch.mean((forward(student, own_spec, x_t, t, cond) - target) ** 2)

    return Objective(draw, loss)
