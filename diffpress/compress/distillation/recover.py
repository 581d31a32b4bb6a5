"""`recover`: train a pruned student to match the model it was pruned from.

On images noised to timesteps of the noise schedule or of the sampling plan, with outputs o and energy maps e of the
blocks (block_features.py), the loss is

    L = w_out |o_s - o_t|^2  +  w_feat mean_b |e_s^b - e_t^b|^2 / |e_t^b|^2  +  w_task |o_s - target|^2

(output + feature distillation of BK-SDM, Kim et al. 2023, eq. 2-4). The teacher is the recipe's, by default
the checkpoint that the run started from.
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
)
from diffpress.compress.distillation.conditioning import drop_conditioning
from diffpress.compress.distillation.config import RecoverConfig
from diffpress.compress.distillation.student import train_student
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, forward, noise_levels_at
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.parameterization import to_output


def recover(checkpoint: Checkpoint, config: RecoverConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model against the teacher; return it with new weights and an unchanged plan."""
    data, spec = data_for(ctx, config.samples), checkpoint.spec
    teacher = ctx.teacher.model.eval()
    # a fixed plan visits few timesteps: `timesteps: plan` spends all of the training on them
    candidates = spec.plan.timesteps if config.timesteps == "plan" else range(len(spec.schedule))
    timesteps = torch.tensor(list(candidates)).round().long()
    blocks = compared_blocks(teacher, checkpoint) if config.feature_weight else []

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors, ...]:
        x0, cond = data.batch(config.batch, generator)
        cond = drop_conditioning(cond, data.uncond, generator)
        t = timesteps[torch.randint(0, len(timesteps), (config.batch,), generator=generator)]
        return x0, torch.randn(x0.shape, generator=generator), t, cond

    def loss(student: nn.Module, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors) -> torch.Tensor:
        teacher.to(x0.device)
        x_t = add_noise(spec, x0, noise, t)
        with torch.no_grad(), capture_features(teacher, blocks) as teacher_features:
            target = forward(teacher, spec, x_t, t, cond)
        with capture_features(student, blocks) as student_features:
            out = forward(student, spec, x_t, t, cond)
        total = config.output_weight * torch.mean((out - target) ** 2)
        if blocks:
            references = {name: energy_map(feature) for name, feature in teacher_features.items()}
            total = total + config.feature_weight * energy_distance(student_features, references)
        if config.task_weight:
            task_target = to_output(spec.prediction, x0, noise, noise_levels_at(spec, t))
            total = total + config.task_weight * torch.mean((out - task_target) ** 2)
        return total

    return checkpoint.evolve(model=train_student(checkpoint, Objective(draw, loss), config, ctx))
