"""`recover`: train a pruned student to match the model it was pruned from.

On images noised to timesteps of the noise schedule or of the sampling plan, with outputs o and energy maps e of the
blocks (block_features.py), the loss is

    L = w_out c |o_s - o_t|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2  +  w_task c |o_s - target|^2

(output + feature distillation of BK-SDM, Kim et al. 2023, eq. 2-4). With `features: projection`, e_s are the features
themselves, projected onto the channels of the teacher's (projected_student.py). c is 1, or with `min_snr_gamma` the
weight of the sample's timestep (training/losses.py). The teacher is the recipe's, by default the checkpoint that the
run started from.
"""

from __future__ import annotations

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.block_features import (
    capture_features,
    compared_blocks,
    energy_distance,
    energy_map,
    relative_distance,
)
from diffpress.compress.distillation.conditioning import drop_conditioning
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.projected_student import projected_student
from diffpress.compress.distillation.student import train_student
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, forward, min_snr_weights, noise_levels_at
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.parameterization import to_output


def recover(checkpoint: Checkpoint, config: RecoverConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model against the teacher; return it with new weights and an unchanged plan."""
    data, spec = data_for(ctx, config.samples), checkpoint.spec
    teacher = ctx.teacher.model.eval()
    # a fixed plan visits few timesteps: `timesteps: plan` spends all of the training on them
    candidates = spec.plan.timesteps if config.timesteps == "plan" else range(len(spec.schedule))
    timesteps = torch.tensor(list(candidates)).round().long()
    blocks = compared_blocks(teacher, checkpoint) if config.feature_weight else []
    projected = None
    if config.features == "projection":
        if not blocks:
            raise InvalidInputError("distill: no block can be compared with the teacher's; set features: energy")
        projected = projected_student(checkpoint, ctx.teacher, blocks, ctx.seed)

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(config.batch, generator)
        cond = drop_conditioning(cond, data.uncond, generator)
        t = timesteps[torch.randint(0, len(timesteps), (config.batch,), generator=generator)]
        return x0, torch.randn(x0.shape, generator=generator), t, cond

    def loss(student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        teacher.to(x0.device)
        x_t = add_noise(spec, x0, noise, t)
        with torch.no_grad(), capture_features(teacher, blocks) as references:
            target = forward(teacher, spec, x_t, t, cond)
        weight = 1.0 if config.min_snr_gamma is None else min_snr_weights(spec, t, config.min_snr_gamma)
        if projected is not None:
            out, features = student(x_t, t, cond)
        else:
            with capture_features(student, blocks) as features:
                out = forward(student, spec, x_t, t, cond)
        total = config.output_weight * torch.mean(weight * (out - target) ** 2)
        if projected is not None:
            total = total + config.feature_weight * relative_distance(features, references)
        elif blocks:
            energies = {name: energy_map(feature) for name, feature in references.items()}
            total = total + config.feature_weight * energy_distance(features, energies)
        if config.task_weight:
            task_target = to_output(spec.prediction, x0, noise, noise_levels_at(spec, t))
            total = total + config.task_weight * torch.mean(weight * (out - task_target) ** 2)
        return total

    objective = Objective(draw, loss)
    if projected is None:
        return checkpoint.evolve(model=train_student(checkpoint, objective, config, ctx))
    trained = train_student(checkpoint, objective, config, ctx, student=projected, part="base")
    return checkpoint.evolve(model=trained.base)
