"""`guidance`: one call of the network learns what classifier-free guidance takes two for (Meng et al. 2023, stage one).

    L = |o_s(x_t, t, c[, w]) - (o_t(x_t, t, null) + w (o_t(x_t, t, c) - o_t(x_t, t, null)))|^2

With `weight` a number, that weight is baked in and the new plan's guidance is 1. With `weights` a range, w is drawn
from it and becomes an input of the network, as in latent consistency models (Luo et al. 2023, section 4.1), where the
kind of denoiser has room for one: the layer that takes it in starts at zero, so the student starts as the teacher.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import guided
from diffpress.compress.distillation.config import GuidanceConfig
from diffpress.compress.distillation.student import trained
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.widths import widths_of
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, forward
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import GUIDANCE


def guidance(checkpoint: Checkpoint, config: GuidanceConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model to answer as the guided teacher; returns it with a plan that needs one call a step.

    Raises InvalidInputError for a model that has nothing to be guided with, and for `weights` where it has no such input.
    """
    spec, data = checkpoint.spec, data_for(ctx, config.samples)
    if spec.conditioning.guidance_input:
        raise InvalidInputError("distill: {kind: guidance}: the model takes the guidance weight as an input already")
    if not data.uncond:
        raise InvalidInputError(
            "distill: {kind: guidance}: the model knows no null label or prompt, so nothing guides it"
        )
    low, high = config.weights or (config.weight or spec.plan.guidance,) * 2
    if low == high == 1.0:
        raise InvalidInputError("distill: {kind: guidance}: weight 1 is no guidance; set weight to more")
    student = with_guidance_input(checkpoint) if config.weights else checkpoint
    plan = spec.plan if config.weights else replace(spec.plan, guidance=1.0)
    if not config.weights:
        ctx.notes["guidance"] = low
    student = student.evolve(spec=student.spec.with_plan(plan))
    teacher = ctx.teacher.model.eval()

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(config.batch, generator)
        t = torch.randint(0, len(spec.schedule), (config.batch,), generator=generator)
        noise = torch.randn(x0.shape, generator=generator)
        weight = low + (high - low) * torch.rand((config.batch,), generator=generator)
        return x0, noise, t, weight, cond, data.uncond

    def loss(
        model: nn.Module,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        weight: torch.Tensor,
        cond: Tensors,
        uncond: Tensors,
    ) -> torch.Tensor:
        teacher.to(x0.device)
        x_t = add_noise(spec, x0, noise, t)
        wanted = guided(teacher, spec, x_t, t, cond, uncond, weight)
        cond |= {GUIDANCE: weight} if config.weights else {}
        return torch.mean((forward(model, student.spec, x_t, t, cond) - wanted) ** 2)

    return student.evolve(model=trained(student, Objective(draw, loss), config, ctx))


def with_guidance_input(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the guidance weight as an input that does nothing yet; InvalidInputError where there is no room."""
    model, spec, source = checkpoint.clone_model(), checkpoint.spec, checkpoint.source
    add_ = getattr(adapter_for(model), "add_guidance_input_", None)
    if add_ is None:
        raise InvalidInputError(
            f"distill: {{kind: guidance}}: a {source.kind} has no input for the guidance weight; "
            "bake one in with weight"
        )
    source = replace(source, config=source.config | add_(model))
    new = {name: widths for name, widths in widths_of(model).items() if name not in widths_of(checkpoint.model)}
    return checkpoint.evolve(
        model=model,
        spec=replace(spec, conditioning=replace(spec.conditioning, guidance_input=True)),
        source=replace(source, original=source.original | new),
    )
