"""Tiny random denoisers, their graphs and scales, and fake quantization in plain torch as the oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization, Source
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.widths import widths_of
from diffpress.export.graph.model import Graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.noise_schedule import betas_schedule, flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.export.oracle import layers_of, measured_scales


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(autouse=True)
def _log_messages(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="diffpress")


class Everything(nn.Module):
    """All operators that can have a layer's weight.

    2d and 1d convolution, a transposed one, Gemm and MatMul with and without bias, an embedding; two equal layers, and
    a layer that is called twice.
    """

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 8, 3, padding=1)
        self.twin_a, self.twin_b = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.twin_b.load_state_dict(self.twin_a.state_dict())
        self.down, self.up = nn.Conv2d(8, 8, 2, stride=2), nn.ConvTranspose2d(8, 6, 2, stride=2)
        self.embedding, self.gemm = nn.Embedding(50, 8), nn.Linear(8, 12)
        self.matmul, self.unbiased = nn.Linear(6, 12), nn.Linear(12, 6, bias=False)
        self.twice, self.line = nn.Linear(6, 6), nn.Conv1d(6, 6, 1)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.twin_b(self.twin_a(torch.tanh(self.first(sample))))
        x = self.up(torch.tanh(self.down(x)))
        time = self.gemm(self.embedding(timestep))
        tokens = x.flatten(2).transpose(1, 2)
        tokens = self.unbiased(torch.tanh(self.matmul(tokens) + time[:, None]))
        tokens = self.line(self.twice(self.twice(tokens)).transpose(1, 2))
        return self.last(tokens.reshape(x.shape))


class Wide(nn.Module):
    """Weights that are large compared to the rest of the file."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.heavy = nn.Conv2d(1, 160, 3, padding=1), nn.Conv2d(160, 160, 3, padding=1)
        self.last = nn.Conv2d(160, 1, 3, padding=1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(self.heavy(self.first(sample))) * timestep[:, None, None, None]


def _checkpoint(
    model: nn.Module, spec: DenoiserSpec, kind: str = "custom", config: dict[str, Any] | None = None
) -> Checkpoint:
    return Checkpoint(model.eval(), spec, Source(kind, config or {}, original=widths_of(model)))


def _unet(conditioning: Conditioning, **settings: int) -> Checkpoint:
    """Return a UNet2DModel [1, 8, 8] with attention, v-prediction and a sampling plan of four steps."""
    config = {
        "_class_name": "UNet2DModel",
        "sample_size": 8,
        "in_channels": 1,
        "out_channels": 1,
        "block_out_channels": [16, 32],
        "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
        "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "attention_head_dim": 16,
        **settings,
    }
    torch.manual_seed(0)
    schedule = betas_schedule("linear", 100)
    spec = DenoiserSpec("v", schedule, (1, 8, 8), make_plan("ddim", 4, schedule), conditioning)
    return _checkpoint(UNet2DModel.from_config(config), spec, "UNet2DModel", config)


@pytest.fixture(scope="session")
def unet() -> Checkpoint:
    """Class-conditional U-Net."""
    return _unet(Conditioning("class", 4, 3), num_class_embeds=4)


@pytest.fixture(scope="session")
def plain() -> Checkpoint:
    """U-Net without classes: the timestep alone determines the time projections of every block."""
    return _unet(Conditioning())


@pytest.fixture(scope="session")
def everything() -> Checkpoint:
    torch.manual_seed(1)
    schedule = betas_schedule("linear", 50)
    return _checkpoint(Everything(), DenoiserSpec("epsilon", schedule, (2, 8, 8), make_plan("ddim", 3, schedule)))


@pytest.fixture(scope="session")
def wide() -> Checkpoint:
    """Flow model with floating-point timesteps."""
    torch.manual_seed(2)
    schedule = flow_schedule(20)
    plan = make_plan("euler", 3, schedule, spacing="linspace")
    return _checkpoint(Wide(), DenoiserSpec("flow", schedule, (1, 8, 8), plan))


@pytest.fixture(scope="session")
def unet_graph(unet: Checkpoint) -> Graph:
    return to_onnx(unet.model, unet.spec)


@pytest.fixture(scope="session")
def everything_graph(everything: Checkpoint) -> Graph:
    return to_onnx(everything.model, everything.spec)


@pytest.fixture(scope="session")
def wide_graph(wide: Checkpoint) -> Graph:
    return to_onnx(wide.model, wide.spec)


@pytest.fixture(scope="session")
def scales() -> Callable[..., Quantization]:
    return measured_scales


@pytest.fixture(scope="session")
def fake_quant() -> Callable[..., np.ndarray]:
    return fake_quant_run


def fake_quant_run(checkpoint: Checkpoint, quantization: Quantization, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the model's output with s * clip(round(x / s)), s = amax / 127, for tensors with an amax."""
    model, amax = checkpoint.clone_model(), quantization.amax
    for name, layer in layers_of(model):
        if f"{name}.weight" in amax:
            axis = 1 if isinstance(layer, nn.ConvTranspose2d) else 0
            shape = [-1 if i == axis else 1 for i in range(layer.weight.dim())]
            layer.weight.data = _rounded(layer.weight.data, amax[f"{name}.weight"].reshape(shape), low=-127)
        if f"{name}.input" in amax:
            layer.register_forward_pre_hook(lambda _, args, a=amax[f"{name}.input"]: (_rounded(args[0], a),))
        if f"{name}.output" in amax:
            layer.register_forward_hook(lambda _, args, out, a=amax[f"{name}.output"]: _rounded(out, a))
    layers = {name for name, _ in layers_of(model)}
    for name, block in model.named_modules():
        if name not in layers and f"{name}.output" in amax:
            block.register_forward_hook(lambda _, args, out, a=amax[f"{name}.output"]: _rounded(out, a))
    with torch.no_grad():
        feed = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return adapter_for(model).forward(model, feed).numpy()


def _rounded(x: torch.Tensor, amax: torch.Tensor, low: int = -128) -> torch.Tensor:
    scale = amax.float() / 127
    return torch.round(x / scale).clamp(low, 127) * scale
