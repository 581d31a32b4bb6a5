"""Network inputs recorded while the model samples: the data of rounding and QAT, as in EfficientDM (He et al. 2023).

The model samples under its own plan, guidance and conditioning, and the inputs of every evaluation are recorded. This
needs no images, and only contains timesteps that sampling visits.
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

TRAJECTORY_SEED = 3_000_000  # disjoint from the seeds used for sampling, calibration and evaluation

TrajectoryDataset = list[dict[str, np.ndarray]]


class _Recorder(TorchNetwork):
    """Records the inputs of every evaluation: [B, ...] by name; under guidance B is twice the number of samples."""

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, dataset: TrajectoryDataset) -> None:
        super().__init__(model, checkpoint.spec)
        self._dataset = dataset

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self._dataset.append(inputs)
        return super().run(inputs)


def sample_trajectories(
    model: nn.Module, checkpoint: Checkpoint, count: int, batch: int, ctx: Context
) -> TrajectoryDataset:
    """Record the inputs of every evaluation while `model` generates `count` samples under the checkpoint's plan."""
    dataset: TrajectoryDataset = []
    network = _Recorder(model, checkpoint, dataset)
    seeds, conditioning = range(TRAJECTORY_SEED, TRAJECTORY_SEED + count), ctx.conditions(count)
    with progress("trajectories", count) as advance:
        done = 0
        for samples in generate_batches(network, checkpoint.spec, seeds, batch=batch, conditions=conditioning):
            done += len(samples)
            advance(done)
    return dataset


def draw_rows(dataset: TrajectoryDataset, size: int, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Draw `size` rows [size, ...] by input name, uniformly over all rows of all evaluations, with replacement."""
    ends = np.cumsum([len(next(iter(evaluation.values()))) for evaluation in dataset])
    picks = torch.randint(0, int(ends[-1]), (size,), generator=generator).numpy()
    indices = [(index := int(np.searchsorted(ends, pick, "right")), int(pick - ends[index])) for pick in picks]
    # row indices are negative, counted from the end of an evaluation's batch
    return {name: torch.from_numpy(np.stack([dataset[i][name][row] for i, row in indices])) for name in dataset[0]}
