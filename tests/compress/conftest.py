"""Fixtures: tiny denoisers with random weights, training images, and a user's module file."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import save_file

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.widths import widths_of
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.sample_data import SampleData
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

UNET = {
    "_class_name": "UNet2DModel",
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [16, 32],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
}

MODULE = """
import torch
from safetensors.torch import load_file
from torch import nn

from diffpress.runtime.noise_schedule import betas_schedule, flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.time = nn.Conv2d(1, 16, 3, padding=1), nn.Linear(1, 16)
        self.norm, self.inner = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 1, 3, padding=1)

    def forward(self, sample, timestep):
        x = self.first(sample) + self.time(timestep[:, None] / 50.0)[:, :, None, None]
        return self.last(torch.tanh(self.inner(torch.tanh(self.norm(x)))))


def load(path):
    model = Small()
    model.load_state_dict(load_file(path))
    schedule = flow_schedule(50) if "PREDICTION" == "flow" else betas_schedule("linear", 50)
    return model, DenoiserSpec("PREDICTION", schedule, (1, 8, 8), make_plan("euler", 3, schedule))
"""


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_unet(classes: int = 0, prediction: str = "v", **config: Any) -> Checkpoint:
    """Make a UNet2DModel [1, 8, 8] with attention and a 4-step plan; the last class is the null label."""
    config = {**UNET, **({"num_class_embeds": classes} if classes else {}), **config}
    torch.manual_seed(0)
    model = UNet2DModel.from_config(config).eval()
    schedule = betas_schedule("linear", 100)
    conditioning = Conditioning("class", classes - 1, classes - 1) if classes else Conditioning()
    spec = DenoiserSpec(prediction, schedule, (1, 8, 8), make_plan("ddim", 4, schedule), conditioning)
    return Checkpoint(model, spec, Source("UNet2DModel", config, original=widths_of(model)))


def make_custom(model: torch.nn.Module, prediction: str = "v", plan_steps: int = 3) -> Checkpoint:
    """Make a checkpoint of any module called as module(sample [B, 1, 8, 8], timestep)."""
    schedule = betas_schedule("linear", 50)
    spec = DenoiserSpec(prediction, schedule, (1, 8, 8), make_plan("ddim", plan_steps, schedule))
    return Checkpoint(model.eval(), spec, Source("custom", original=widths_of(model)))


def outputs_of(checkpoint: Checkpoint) -> torch.Tensor:
    """Return the checkpoint's output on fixed inputs, with fake quantization if it is quantized."""
    model = fake_quantized(checkpoint)
    with torch.no_grad():
        return adapter_for(model).forward(model, dummy_inputs(checkpoint.spec, 3, seed=5))


@pytest.fixture(scope="session")
def unet_with() -> Callable[..., Checkpoint]:
    return make_unet


@pytest.fixture(scope="session")
def custom() -> Callable[..., Checkpoint]:
    return make_custom


@pytest.fixture(scope="session")
def output() -> Callable[[Checkpoint], torch.Tensor]:
    return outputs_of


@pytest.fixture(scope="session")
def plain() -> Checkpoint:
    return make_unet(prediction="epsilon")


@pytest.fixture(scope="session")
def unet() -> Checkpoint:
    return make_unet(classes=4)


@pytest.fixture(scope="session")
def pruned(unet: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    config = PruneConfig(method="magnitude", ratio=0.4, round_to=4)
    return prune(unet, config, Context(0, tmp_path_factory.mktemp("prune"), unet))


@pytest.fixture(scope="session")
def quantized(pruned: Checkpoint, unet: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    context = Context(0, tmp_path_factory.mktemp("quantize"), unet)
    return quantize(pruned, QuantizeConfig(samples=4, batch=4), context)


@pytest.fixture(scope="session")
def images(unet: Checkpoint) -> SampleData:
    """Stripes and checkerboards of three classes, uint8 [48, 1, 8, 8]."""
    x, labels = image_arrays()
    return SampleData(x[:, None], labels, "images", unet.spec)


@pytest.fixture
def npz(tmp_path: Path) -> Path:
    x, labels = image_arrays()
    np.savez(tmp_path / "images.npz", x=x, y=labels)
    return tmp_path / "images.npz"


def image_arrays() -> tuple[np.ndarray, np.ndarray]:
    rows, columns = np.indices((8, 8))
    classes = np.stack([rows % 2, columns % 2, (rows + columns) % 2]) * 200
    labels = np.arange(48) % 3
    noise = np.random.default_rng(0).integers(0, 56, (48, 8, 8))
    return (classes[labels] + noise).astype(np.uint8), labels


@pytest.fixture
def context(images: SampleData, tmp_path: Path) -> Callable[..., Context]:
    def make(teacher: Checkpoint, seed: int = 0, data: bool = True) -> Context:
        labels = images.labels if teacher.spec.conditioning.kind == "class" else None
        found = SampleData(images.x, labels, images.hash, teacher.spec) if data else None
        return Context(seed, tmp_path / "work", teacher, found)

    return make


@pytest.fixture
def custom_files(tmp_path: Path) -> Callable[..., tuple[Path, Path]]:
    """A user's module file and its weights, for a given prediction type."""

    def make(prediction: str = "epsilon") -> tuple[Path, Path]:
        file, weights = tmp_path / "mine.py", tmp_path / "mine.safetensors"
        file.write_text(MODULE.replace("PREDICTION", prediction))
        code: dict[str, Any] = {"__name__": "mine"}
        exec(file.read_text(), code)
        torch.manual_seed(1)
        save_file(code["Small"]().state_dict(), weights)
        return file, weights

    return make


@pytest.fixture
def pipeline_folder(plain: Checkpoint, tmp_path: Path) -> Path:
    """A folder as diffusers saves it: unet/ and scheduler/."""
    folder = tmp_path / "pipeline"
    model: Any = plain.model
    model.save_pretrained(folder / "unet")
    write_scheduler(folder)
    return folder


def write_scheduler(folder: Path, **settings: Any) -> None:
    (folder / "scheduler").mkdir(parents=True, exist_ok=True)
    config = {"_class_name": "DDPMScheduler", "num_train_timesteps": 100, **settings}
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(config))


@pytest.fixture
def scheduler() -> Callable[..., None]:
    return write_scheduler


@pytest.fixture
def reopened() -> Callable[..., Checkpoint]:
    return load_checkpoint
