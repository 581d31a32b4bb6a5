"""`consistency`: every point of one noise line learns to give the same image (ECT, Geng et al. 2024; "easy" tuning).

With r = sigma / alpha the noise level, f(x, r) the network's x_0, and t > s two levels on the same noise,

    L = w (sqrt(|f(x_t) - stopped f(x_s)|^2 + c^2) - c),     w = 1 / (r_t - r_s),  c = 0.00054 sqrt(dimensions)
    ln r_t ~ N(level_mean, level_sd),   r_s = r_t max(0, 1 - n(r_t) / q^k),   n(r) = 1 + 8 / (1 + e^r),  k = 1 .. stages

(pseudo-Huber metric, eq. 12; mapping, eq. 15, over the stages of the training.) At s = 0 the target is the image
itself, so training starts as the denoising that the network was pretrained for and ends as consistency. What f has to
keep is f(x, 0) = x: for epsilon, v and flow, x_0 read off the output does (sigma multiplies the output there), so each
network keeps its own parameterisation, exactly. Both calls share their dropout.

Two calls and more add fresh noise in between (solver `consistency`).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import ConsistencyConfig
from diffpress.compress.distillation.few_steps import few_timesteps, log_ratios, student_spec, x0_of
from diffpress.compress.distillation.student import trained
from diffpress.compress.training.loop import Objective
from diffpress.compress.training.losses import Tensors, add_noise, coefficients, forward
from diffpress.compress.training.teacher_data import data_for
from diffpress.runtime.noise_schedule import NoiseSchedule
from diffpress.runtime.spec import DenoiserSpec

GAP, HUBER = 8.0, 0.00054


def consistency(checkpoint: Checkpoint, config: ConsistencyConfig, ctx: Context) -> Checkpoint:
    """Tune the checkpoint's model into a consistency function; returns it with a plan of so many calls."""
    data, schedule = data_for(ctx, config.samples), checkpoint.spec.schedule
    # it learns every level, and so one and two calls alike
    own, *others = (few_timesteps(n, schedule) for n in dict.fromkeys((config.sample_steps, 1, 2)))
    spec = student_spec(checkpoint.spec, config.kind, "consistency", own, tuple(others))

    drops = any(isinstance(module, nn.Dropout) and module.p > 0 for module in checkpoint.model.modules())

    def draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor | Tensors | int | None, ...]:
        x0, cond = data.batch(config.batch, generator)
        t, s = pairs(schedule, config, share, generator)
        noise = torch.randn(x0.shape, generator=generator)
        return x0, noise, t, s, cond, int(torch.randint(0, 2**31, (), generator=generator)) if drops else None

    def loss(
        student: nn.Module,
        x0: torch.Tensor,
        noise: torch.Tensor,
        t: torch.Tensor,
        s: torch.Tensor,
        cond: Tensors,
        dropout: int | None,
    ) -> torch.Tensor:
        _reseed(dropout)
        found = image_at(student, spec, x0, noise, t, cond)
        _reseed(dropout)
        with torch.no_grad():
            near = image_at(student, spec, x0, noise, s.clamp_min(0), cond)
        clean = (s < 0).view(-1, 1, 1, 1)
        gap = levels(spec, t) - torch.where(clean, 0.0, levels(spec, s.clamp_min(0)))
        return torch.mean(pseudo_huber(found - torch.where(clean, x0, near)) / gap.flatten())

    student = trained(checkpoint.evolve(spec=spec), Objective(draw, loss), config, ctx)
    return checkpoint.evolve(model=student, spec=spec)


def _reseed(dropout: int | None) -> None:
    if dropout is not None:
        torch.manual_seed(dropout)


def pairs(
    schedule: NoiseSchedule, config: ConsistencyConfig, share: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole timesteps t > s, int64 [B]; s is -1 for the image itself. `share` of the training is behind."""
    log_r = log_ratios(schedule)
    drawn = config.level_mean + config.level_sd * torch.randn((config.batch,), generator=generator).numpy()
    t = np.clip(np.round(_timesteps_at(log_r, drawn)), 0, len(log_r) - 1).astype(np.int64)
    r = np.exp(log_r[t])
    gap = 1.0 + GAP / (1.0 + np.exp(np.minimum(r, 50.0)))
    stage = 1 + int(share * config.stages)
    nearer = r * np.maximum(0.0, 1.0 - gap / config.q**stage)
    s = np.full_like(t, -1)
    seen = nearer >= np.exp(log_r[0])
    s[seen] = np.minimum(np.round(_timesteps_at(log_r, np.log(nearer[seen]))), t[seen] - 1)
    return torch.from_numpy(t), torch.from_numpy(s)


def image_at(
    model: nn.Module, spec: DenoiserSpec, x0: torch.Tensor, noise: torch.Tensor, t: torch.Tensor, cond: Tensors
) -> torch.Tensor:
    """F at the timesteps `t` [B] of the lines through `x0` and `noise`, [B, C, H, W]."""
    x_t = add_noise(spec, x0, noise, t)
    return x0_of(spec, forward(model, spec, x_t, t, cond), x_t, *coefficients(spec, t))


def levels(spec: DenoiserSpec, t: torch.Tensor) -> torch.Tensor:
    """R = sigma / alpha at timesteps `t` [B], shaped [B, 1, 1, 1]; finite where alpha is zero."""
    alpha, sigma = coefficients(spec, t)
    return sigma / alpha.clamp_min(1e-4)


def pseudo_huber(difference: torch.Tensor) -> torch.Tensor:
    """sqrt(|d|^2 + c^2) - c over all but the first axis, [B]."""
    c = HUBER * math.sqrt(difference[0].numel())
    return torch.sqrt(difference.square().flatten(1).sum(1) + c * c) - c


def _timesteps_at(log_r: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    return np.interp(wanted, log_r, np.arange(len(log_r)))
