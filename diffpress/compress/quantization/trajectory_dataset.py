"""States of a model's own trajectory: what rounding and training learn from, as in EfficientDM (He et al. 2023).

The model samples by its own plan, under its guidance and conditions, and every call of the network is kept. No images
are needed, and no timestep is looked at that sampling never visits.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.progress import progress
from diffpress.runtime.sampler import generate_batches

TRAJECTORY_SEED = 3_000_000  # far from the seeds that people sample, calibrate and evaluate with

TrajectoryDataset = list[dict[str, np.ndarray]]


class _Recorder(TorchNetwork):
    """A network that keeps the inputs of every call: [B, ...] by name, twice the samples under guidance."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, calls: TrajectoryDataset) -> None:
        super().__init__(model, checkpoint.spec)
        self._calls = calls

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self._calls.append(inputs)
        return super().run(inputs)


def sample_trajectories(
    model: nn.Module, checkpoint: Checkpoint, count: int, batch: int, ctx: Context
) -> TrajectoryDataset:
    """The inputs of every call while `model` makes `count` samples by the checkpoint's own plan, `batch` at a time."""
    calls: TrajectoryDataset = []
    network = _Recorder(model, checkpoint, calls)
    seeds, conditioning = range(TRAJECTORY_SEED, TRAJECTORY_SEED + count), ctx.conditions(count)
    with progress("trajectories", count) as advance:
        done = 0
        for samples in generate_batches(network, checkpoint.spec, seeds, batch=batch, conditions=conditioning):
            done += len(samples)
            advance(done)
    return calls


def draw(calls: TrajectoryDataset, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """`size` rows [size, ...] by name, uniform over all rows of all calls."""
    ends = np.cumsum([len(next(iter(call.values()))) for call in calls])
    picks = torch.randint(0, int(ends[-1]), (size,), generator=generator).numpy()
    places = [(which := int(np.searchsorted(ends, pick, "right")), int(pick - ends[which])) for pick in picks]
    # rows are counted from a call's end: -1 is its last
    return {name: torch.from_numpy(np.stack([calls[c][name][row] for c, row in places])) for name in calls[0]}
