"""`progressive`: one step of the student does for two of its teacher, again and again (Salimans & Ho 2022).

From x = alpha x_0 + sigma eps of the data the teacher takes two deterministic steps to x'' (few_steps.py), and x_0~ is
the image with which one step would lead there,

    x_0~ = (x'' - k x) / (alpha'' - k alpha),   k = sigma'' / sigma          L = max(SNR, 1) |x_0 - x_0~|^2

for the student's x_0 (algorithm 2, "truncated SNR"). Each halving's student is the next one's teacher. An epsilon
prediction says nothing of the image at pure noise, where few steps have to tell it: a network that predicts epsilon
first learns to predict v = (eps - sigma x) / alpha. Guidance in the plan goes into the first halving.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context, Data
from diffpress.compress.distillation.conditioning import guidance_in, guided
from diffpress.compress.distillation.config import ProgressiveConfig
from diffpress.compress.distillation.few_steps import (
    Places,
    clipped,
    few_timesteps,
    implied_x0,
    places,
    student_spec,
    transfer,
    x0_of,
)
from diffpress.compress.distillation.student import trained
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, coefficients, forward
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.sampling_plan import plan_levels
from diffpress.runtime.spec import DenoiserSpec


def progressive(checkpoint: Checkpoint, config: ProgressiveConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model until it samples in `config.sample_steps` steps; returns it with that plan."""
    data, schedule = data_for(ctx, config.samples), checkpoint.spec.schedule
    weight = ctx.notes["guidance"] = guidance_in(checkpoint)
    timesteps = few_timesteps(config.start_steps, schedule)
    student = checkpoint.evolve(spec=student_spec(checkpoint.spec, config.kind, "ddim", timesteps))
    teacher, spec = ctx.teacher.model.eval(), ctx.teacher.spec
    if student.spec.prediction == "epsilon":
        student = student.evolve(spec=replace(student.spec, prediction="v"))
        loss = in_v(teacher, spec, data, config.batch)
        student = student.evolve(model=trained(student, loss, config, ctx, "to v"))
    while len(timesteps) > config.sample_steps:
        fine, timesteps = timesteps, timesteps[::2]
        student = student.evolve(spec=student.spec.with_plan(student.spec.plan.over(timesteps)))
        loss = _halving(teacher, spec, data, fine, student.spec, weight, config.batch)
        student = student.evolve(model=trained(student, loss, config, ctx, f"{len(fine)} to {len(timesteps)} steps"))
        teacher, spec, weight = student.model, student.spec, student.spec.plan.guidance
    return student


def _halving(
    teacher: nn.Module,
    spec: DenoiserSpec,
    data: Data,
    fine: tuple[float, ...],
    own: DenoiserSpec,
    weight: float,
    batch: int,
) -> Objective:
    """`spec` and `fine` are the teacher's, `own` is the student's, which takes two of the fine steps at once."""
    points = plan_levels(spec.schedule, fine)

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(batch, generator)
        index = 2 * torch.randint(0, len(fine) // 2, (batch,), generator=generator)
        return x0, torch.randn(x0.shape, generator=generator), index, cond, data.uncond

    def loss(
        student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, index: torch.Tensor, cond: Tensors, uncond: Tensors
    ) -> torch.Tensor:
        teacher.to(x0.device)
        here, middle, there = (places(points, index + i) for i in range(3))
        x = here.alpha * x0 + here.sigma * noise
        with torch.no_grad():
            moved = x
            for a, b in ((here, middle), (middle, there)):
                moved = transfer(moved, _guided_x0(teacher, spec, moved, a, cond, uncond, weight), a, b)
        out = forward(student, own, x, here.t, cond)
        found = x0_of(own, out, x, here.alpha, here.sigma)
        snr = (here.alpha / here.sigma) ** 2
        return torch.mean(snr.clamp_min(1.0) * (found - implied_x0(x, moved, here, there)) ** 2)

    return Objective(draw, loss)


def _guided_x0(
    teacher: nn.Module, spec: DenoiserSpec, x: torch.Tensor, here: Places, cond: Tensors, uncond: Tensors, weight: float
) -> torch.Tensor:
    out = guided(teacher, spec, x, here.t, cond, uncond, weight)
    return clipped(spec, x0_of(spec, out, x, here.alpha, here.sigma))


def in_v(teacher: nn.Module, spec: DenoiserSpec, data: Data, batch: int) -> Objective:
    """A student that predicts v learns the v of a teacher that predicts epsilon, at all timesteps."""
    own = replace(spec, prediction="v")

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(batch, generator)
        t = torch.randint(0, len(spec.schedule), (batch,), generator=generator)
        return x0, torch.randn(x0.shape, generator=generator), t, cond

    def loss(student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        teacher.to(x0.device)
        x_t, (alpha, sigma) = add_noise(spec, x0, noise, t), coefficients(spec, t)
        with torch.no_grad():
            eps = forward(teacher, spec, x_t, t, cond)
        # bounded, since at pure noise the least error of epsilon is a large one of the image; latents by those at hand
        image = x0_of(spec, eps, x_t, alpha, sigma)
        image = image.clamp(*spec.data_range) if spec.is_pixel_space else image.clamp(x0.min(), x0.max())
        wanted = alpha * (x_t - alpha * image) / sigma.clamp_min(1e-4) - sigma * image
        return torch.mean((forward(student, own, x_t, t, cond) - wanted) ** 2)

    return Objective(draw, loss)
