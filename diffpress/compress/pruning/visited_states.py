"""Inputs that a network receives while it samples under its own plan, for criteria that evaluate it there."""

from __future__ import annotations

import json
from collections.abc import Iterator

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset

STATES = 8  # per trajectory
BATCH = 16

Tensors = dict[str, torch.Tensor]


def visited_batches(checkpoint: Checkpoint, samples: int, ctx: Context) -> list[Tensors]:
    """Return inputs by name, [BATCH, ...], drawn from all steps of `samples` trajectories."""
    facts = [checkpoint.hash, samples, ctx.data.hash if ctx.data else None]
    dataset = TrajectoryDataset(
        checkpoint.model,
        checkpoint.spec,
        ctx.conditions,
        samples=samples,
        trained_on=0,
        batch=min(samples, BATCH),
        work=ctx.work,
        run=json.dumps(facts),
    )
    return list(_split(dataset.draw(STATES * samples, torch.Generator().manual_seed(ctx.seed)).inputs))


def _split(inputs: Tensors) -> Iterator[Tensors]:
    for start in range(0, len(inputs["sample"]), BATCH):
        yield {name: tensor[start : start + BATCH] for name, tensor in inputs.items()}
