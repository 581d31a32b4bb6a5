"""Importance of the channels of a coupled group, summed over all weights of the channel.

random          uniform noise
magnitude       sum |w|
taylor          sum |w * dL/dw|, gradients of the denoising loss accumulated over timesteps of the whole schedule
diff_pruning    taylor from low noise upward, until L_t < T * max L     (Fang et al. 2023, eq. 5-6 and alg. 1)
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.diffusers_blocks import Coupled
from diffpress.compress.progress import progress
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.training.losses import epsilon_loss
from diffpress.compress.training.teacher_data import data_for

Importance = Callable[[torch.Tensor], torch.Tensor]

GRADIENT_METHODS = ("taylor", "diff_pruning")
THRESHOLD = 0.05  # of diff_pruning, as in the paper


def needs_gradients(config: PruneConfig) -> bool:
    """Return whether the criterion reads gradients of the denoising loss."""
    return config.method in GRADIENT_METHODS


def importance_of(
    model: nn.Module, checkpoint: Checkpoint, config: PruneConfig, ctx: Context
) -> Callable[[], Importance]:
    """Return a factory of functions that map a weight to the importance of its elements.

    Each function gives the same values if it is called for the same weights in the same order. Gradients are left in
    `model`.
    """
    if config.method == "random":
        return lambda: partial(_random, torch.Generator().manual_seed(ctx.seed))
    if config.method == "magnitude":
        return lambda: lambda weight: weight.detach().abs()
    _accumulate_gradients_(model, checkpoint, config, ctx)
    return lambda: _taylor


def _random(generator: torch.Generator, weight: torch.Tensor) -> torch.Tensor:
    return torch.rand(weight.shape, generator=generator)


def _taylor(weight: torch.Tensor) -> torch.Tensor:
    return (weight * weight.grad).detach().abs() if weight.grad is not None else torch.zeros_like(weight)


def _accumulate_gradients_(model: nn.Module, checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> None:
    data = data_for(ctx, config.batch)
    generator = torch.Generator().manual_seed(ctx.seed)
    x0, conditions = data.batch(config.batch, generator)
    noise = torch.randn(x0.shape, generator=generator)
    top = len(checkpoint.spec.schedule)
    timesteps = torch.linspace(0, top - 1, config.timesteps).long()
    threshold = 0.0 if config.method == "taylor" else THRESHOLD if config.threshold is None else config.threshold
    largest = 0.0
    with progress("importance of channels", len(timesteps)) as advance:
        for done, t in enumerate(timesteps.tolist()):
            step = torch.full((len(x0),), t, dtype=torch.long)
            loss = epsilon_loss(model, checkpoint.spec, x0, noise, step, conditions)
            largest = max(largest, loss.item())
            if loss.item() < threshold * largest:
                break  # the remaining high-noise timesteps carry little information about content
            loss.backward()
            advance(done + 1, f"loss {loss.item():.4f}")


def group_scores(group: Coupled, importance: Importance) -> torch.Tensor:
    """Return I_c [C]: the importance of all weights that the members hold for index c."""
    scores = torch.zeros(group.channels)
    for m in group.members:
        if m.side in ("out", "in"):
            values, positions = importance(m.layer.weight), slice(m.offset, m.offset + group.channels * m.width)
            if m.side == "out":
                scores += values[positions].reshape(group.channels, -1).sum(1)
            else:
                scores += values[:, positions].reshape(len(values), group.channels, -1).sum((0, 2))
    return scores
