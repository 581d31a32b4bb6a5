"""`consistency`: train all points of one noise line to give the same image (ECT, Geng et al. 2024).

Let r = sigma / alpha be the noise level, f(x, r) the network's x_0, and t > s two levels on the same noise. The loss is

    L = w (sqrt(|f(x_t) - stopped f(x_s)|^2 + c^2) - c),     w = 1 / (r_t - r_s),  c = 0.00054 sqrt(dimensions)
    ln r_t ~ N(level_mean, level_sd),   r_s = r_t max(0, 1 - n(r_t) / q^k),   n(r) = 1 + 8 / (1 + e^r),  k = 1 .. stages

(pseudo-Huber metric, eq. 12; mapping, eq. 15, over the stages of the training). At r_s = 0 the target is the image
itself, so training starts as denoising, which the network was pretrained for, and ends as consistency training. The
boundary condition f(x, 0) = x holds exactly for epsilon, v and flow predictions, where sigma multiplies the output in
x_0, so each network keeps its own parameterization. Both evaluations use the same dropout.

Sampling with two or more evaluations adds fresh noise in between (solver `consistency`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import ConsistencyConfig
from diffpress.compress.distillation.few_steps import few_timesteps, log_ratios, student_spec
from diffpress.compress.distillation.student import train_student
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, forward, noise_levels_at, per_sample
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.noise_schedule import NoiseSchedule
from diffpress.runtime.parameterization import MIN_DIVISOR, to_x0
from diffpress.runtime.spec import DenoiserSpec

MAPPING_K, HUBER = 8.0, 0.00054


def consistency(checkpoint: Checkpoint, config: ConsistencyConfig, ctx: Context) -> Checkpoint:
    """Train the checkpoint's model into a consistency function of `config.sample_steps` steps."""
    data, schedule = data_for(ctx, config.samples), checkpoint.spec.schedule
    # all levels are trained, so sampling in one and in two steps is always possible
    own, *others = (few_timesteps(n, schedule) for n in dict.fromkeys((config.sample_steps, 1, 2)))
    spec = student_spec(checkpoint.spec, config.kind, "consistency", own, tuple(others))

    has_dropout = any(isinstance(module, nn.Dropout) and module.p > 0 for module in checkpoint.model.modules())

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors | int | None, ...]:
        x0, cond = data.batch(config.batch, generator)
        t, s = draw_timestep_pairs(schedule, config, share, generator)
        noise = torch.randn(x0.shape, generator=generator)
        return x0, noise, t, s, cond, int(torch.randint(0, 2**31, (), generator=generator)) if has_dropout else None

    def loss(
        student: nn.Module,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        cond: Tensors,
        dropout_seed: int | None,
    ) -> torch.Tensor:
        _seed_dropout(dropout_seed)
        x0_t = consistency_x0(student, spec, x0, noise, t, cond)
        _seed_dropout(dropout_seed)
        with torch.no_grad():
            x0_s = consistency_x0(student, spec, x0, noise, s.clamp_min(0), cond)
        clean = per_sample(s < 0, x0.dim() - 1)
        gap = noise_ratios(spec, t) - torch.where(clean, 0.0, noise_ratios(spec, s.clamp_min(0)))
        return torch.mean(pseudo_huber(x0_t - torch.where(clean, x0, x0_s)) / gap.flatten())

    student = train_student(checkpoint.evolve(spec=spec), Objective(draw, loss), config, ctx)
    return checkpoint.evolve(model=student, spec=spec)


def _seed_dropout(dropout_seed: int | None) -> None:
    if dropout_seed is not None:
        torch.manual_seed(dropout_seed)


def draw_timestep_pairs(
    schedule: NoiseSchedule, config: ConsistencyConfig, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw integer timesteps t > s, each int64 [B]; s = -1 is the clean image.

    `share` is the completed fraction of the training, which sets the gap between t and s.
    """
    log_r = log_ratios(schedule)
    log_r_t = config.level_mean + config.level_sd * torch.randn((config.batch,), generator=generator).numpy()
    t = np.clip(np.round(_timesteps_at(log_r, log_r_t)), 0, len(log_r) - 1).astype(np.int64)
    r = np.exp(log_r[t])
    gap = 1.0 + MAPPING_K / (1.0 + np.exp(np.minimum(r, 50.0)))
    stage = 1 + int(share * config.stages)
    r_s = r * np.maximum(0.0, 1.0 - gap / config.q**stage)
    s = np.full_like(t, -1)
    noisy = r_s >= np.exp(log_r[0])
    s[noisy] = np.minimum(np.round(_timesteps_at(log_r, np.log(r_s[noisy]))), t[noisy] - 1)
    return torch.from_numpy(t), torch.from_numpy(s)


def consistency_x0(
    model: nn.Module, spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors
) -> torch.Tensor:
    """Return f [B, ...] at timesteps `t` [B] on the lines through `x0` and `noise`."""
    x_t = add_noise(spec, x0, noise, t)
    return to_x0(spec.prediction, x_t, forward(model, spec, x_t, t, cond), noise_levels_at(spec, t))


def noise_ratios(spec: DenoiserSpec, t: torch.Tensor) -> torch.Tensor:
    """Return sigma / alpha at timesteps `t` [B], shaped [B, 1, ...]; finite where alpha is zero."""
    level = noise_levels_at(spec, t)
    return level.sigma / level.alpha.clamp_min(MIN_DIVISOR)


def pseudo_huber(difference: torch.Tensor) -> torch.Tensor:
    """Return sqrt(|d|^2 + c^2) - c over all but the first axis, [B]."""
    c = HUBER * math.sqrt(difference[0].numel())
    return torch.sqrt(difference.square().flatten(1).sum(1) + c * c) - c


def _timesteps_at(log_r: np.ndarray, targets: np.ndarray) -> np.ndarray:
    return np.interp(targets, log_r, np.arange(len(log_r)))
