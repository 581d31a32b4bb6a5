"""`guidance`: train one evaluation to replace the two of guidance (Meng et al. 2023, stage one).

    L = |o_s(x_t, t, c[, w]) - (o_t(x_t, t, null) + w (o_t(x_t, t, c) - o_t(x_t, t, null)))|^2

With `weight`, a number, that weight is baked in and the guidance of the new plan is 1. With `weights`, a range, w is
drawn from it and becomes an input of the network, as in latent consistency models (Luo et al. 2023, section 4.1), for
denoisers that support this input. Its layer is initialized to zero, so the student starts equal to the teacher.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.conditioning import guided_output
from diffpress.compress.distillation.config import GuidanceConfig
from diffpress.compress.distillation.student import train_student
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.widths import widths_of
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, forward
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import GUIDANCE


def guidance(checkpoint: Checkpoint, config: GuidanceConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model to match the guided teacher in one evaluation per step.

    Raises:
        InvalidInputError: The model has no unconditional input, already takes the guidance weight as an input, or
            cannot take it although `weights` is set; or the weight is 1.
    """
    spec, data = checkpoint.spec, data_for(ctx, config.samples)
    if spec.conditioning.guidance_input:
        raise InvalidInputError("distill: {kind: guidance}: the model already takes the guidance weight as an input")
    if not data.uncond:
        raise InvalidInputError(
            "distill: {kind: guidance}: the model has no null label or prompt, so it cannot be guided"
        )
    low, high = config.weights or (config.weight or spec.plan.guidance,) * 2
    if high <= 1.0:
        raise InvalidInputError(f"distill: {{kind: guidance}}: weight {high:g} is no guidance; set one above 1")
    student = with_guidance_input(checkpoint) if config.weights else checkpoint
    if not config.weights:
        ctx.notes["guidance"] = low
        student = student.evolve(spec=replace(spec, plan=replace(spec.plan, guidance=1.0), baked_in_guidance=low))
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
        target = guided_output(teacher, spec, x_t, t, cond, uncond, weight)
        cond |= {GUIDANCE: weight} if config.weights else {}
        return torch.mean((forward(model, student.spec, x_t, t, cond) - target) ** 2)

    return student.evolve(model=train_student(student, Objective(draw, loss), config, ctx))


def with_guidance_input(checkpoint: Checkpoint) -> Checkpoint:
    """Return the checkpoint with the guidance weight as an input that has no effect before training.

    Raises:
        InvalidInputError: The model's family does not support this input.
    """
    model, spec, source = checkpoint.clone_model(), checkpoint.spec, checkpoint.source
    add_ = adapter_for(model).add_guidance_input_
    if add_ is None:
        raise InvalidInputError(
            f"distill: {{kind: guidance}}: a {source.kind} has no input for the guidance weight; "
            "set weight to bake one in"
        )
    source = replace(source, config=source.config | add_(model))
    new = {name: widths for name, widths in widths_of(model).items() if name not in widths_of(checkpoint.model)}
    return checkpoint.evolve(
        model=model,
        spec=replace(spec, conditioning=replace(spec.conditioning, guidance_input=True)),
        source=replace(source, original=source.original | new),
    )
