"""The exact denoiser of a single image, which every distilled student can reproduce exactly."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.models.widths import widths_of
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec


class OneImage(nn.Module):
    """Denoiser that predicts x_0 = `image`, its only parameter, for every input."""

    alphas: torch.Tensor
    sigmas: torch.Tensor

    def __init__(self, prediction: str, schedule: NoiseSchedule, image: torch.Tensor) -> None:
        super().__init__()
        self.prediction, self.image = prediction, nn.Parameter(image)
        self.register_buffer("alphas", torch.tensor(schedule.alphas, dtype=torch.float32))
        self.register_buffer("sigmas", torch.tensor(schedule.sigmas, dtype=torch.float32))

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        t = timestep.long()
        alpha, sigma = self.alphas[t].view(-1, 1, 1, 1), self.sigmas[t].view(-1, 1, 1, 1).clamp_min(1e-6)
        eps = (sample - alpha * self.image) / sigma
        image = self.image.expand_as(sample)
        return {"epsilon": eps, "v": alpha * eps - sigma * image, "flow": eps - image, "sample": image}[self.prediction]


@pytest.fixture
def one_image() -> Callable[..., Checkpoint]:
    """Make a checkpoint [1, 8, 8] that generates `image`, stripes by default, from any noise."""

    def make(prediction: str = "v", image: torch.Tensor | None = None) -> Checkpoint:
        schedule = flow_schedule(100) if prediction == "flow" else betas_schedule("linear", 100, 1e-3, 0.12)
        stripes = torch.linspace(-0.8, 0.8, 8).expand(1, 1, 8, 8).clone()
        model = OneImage(prediction, schedule, stripes if image is None else image).eval()
        plan = make_plan("ddim", 4, schedule, clip=False)
        return Checkpoint(
            model, DenoiserSpec(prediction, schedule, (1, 8, 8), plan), Source("custom", original=widths_of(model))
        )

    return make
