"""Users' files of custom models whose samples are no images, or whose conditioning is no label.

    FILES[name]                         the text of the file, which defines `load`
    custom_model(name, folder)          write it with its weights; returns 'file.py:weights' for `load_checkpoint`
    conditioning(name, count)           conditioning arrays of its samples
    write_data(name, file)              an npz file for training and calibration

Each network predicts v of standard normal data, which is 0, plus the output of a small
random network: sampling contracts, so that rounding errors stay small.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

HEAD = """
import torch
from torch import nn

from diffpress import Conditioning, DenoiserSpec, TensorInput, betas_schedule, make_plan

schedule = betas_schedule("linear", 100, 1e-3, 0.2)


def spec(shape, **settings):
    guidance = settings.pop("guidance", 1.0)
    plan = make_plan("ddim", 4, schedule, guidance=guidance, clip=False)
    return DenoiserSpec("v", schedule, shape, plan, **settings)


def load(path):
    torch.manual_seed(0)
    return make()
"""

FILES = {
    "points": HEAD
    + """
class Points(nn.Module):
    def __init__(self):
        super().__init__()
        self.time = nn.Linear(1, 32)
        self.first, self.inner, self.last = nn.Linear(2, 32), nn.Linear(32, 32), nn.Linear(32, 2)

    def forward(self, sample, timestep):
        h = torch.relu(self.first(sample) + self.time(timestep.float()[:, None] / 100))
        return 0.1 * self.last(torch.relu(self.inner(h)))


def make():
    return Points(), spec((2,))
""",
    "sequence": HEAD
    + """
class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner, self.last = (nn.Conv1d(a, b, 3, padding=1) for a, b in ((3, 32), (32, 32), (32, 3)))
        self.see, self.task = nn.Linear(10, 32), nn.Embedding(5, 32)

    def forward(self, sample, timestep, observation, task):
        cond = self.see(observation.flatten(1)) + self.task(task) + timestep.float()[:, None] / 100
        h = torch.relu(self.first(sample) + cond[:, :, None])
        return 0.1 * self.last(torch.relu(self.inner(h)))


def make():
    inputs = {"observation": TensorInput((2, 5), null=0.0), "task": TensorInput((), "int64", null=4)}
    return Policy(), spec((3, 8), guidance=2.0, conditioning=Conditioning("tensors", tensors=inputs))
""",
    "video": HEAD
    + """
class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv3d(1, 16, 3, padding=1), nn.Conv3d(16, 16, 3, padding=1)
        self.last, self.time = nn.Conv3d(16, 1, 3, padding=1), nn.Linear(1, 16)

    def forward(self, sample, timestep):
        h = self.first(sample) + self.time(timestep.float()[:, None] / 100)[:, :, None, None, None]
        return 0.1 * self.last(torch.relu(self.inner(torch.relu(h))))


def make():
    return Video(), spec((1, 3, 8, 8))
""",
    "upscaler": HEAD
    + """
class Upscaler(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(6, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, sample, timestep, low_res):
        low = nn.functional.interpolate(low_res, scale_factor=2.0, mode="nearest")
        h = torch.relu(self.first(torch.cat([sample, low], 1)))
        return 0.1 * self.last(torch.relu(self.inner(h + timestep.float()[:, None, None, None] / 100)))


def make():
    inputs = {"low_res": TensorInput((3, 4, 4))}
    return Upscaler(), spec((3, 8, 8), conditioning=Conditioning("tensors", tensors=inputs))
""",
    "latents": HEAD
    + """
class Latents(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.inner = nn.Conv2d(4, 16, 3, padding=1), nn.Conv2d(16, 16, 3, padding=1)
        self.last = nn.Conv2d(16, 4, 3, padding=1)

    def forward(self, sample, timestep):
        h = torch.relu(self.first(sample))
        return 0.1 * self.last(torch.relu(self.inner(h + timestep.float()[:, None, None, None] / 100)))


class Decoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.ConvTranspose2d(4, 3, 2, stride=2)

    def forward(self, latents):
        return torch.tanh(self.up(latents))


def make():
    return Latents(), spec((4, 8, 8), latent_factor=2, latent_scale=0.5, latent_shift=0.1), Decoder()
""",
}

SHAPES = {"points": (2,), "sequence": (3, 8), "video": (1, 3, 8, 8), "upscaler": (3, 8, 8), "latents": (4, 8, 8)}


def custom_model(name: str, folder: Path) -> str:
    """Write the file of a custom model and weights that its `load` does not read; returns 'file.py:weights'."""
    file, weights = folder / f"{name}.py", folder / f"{name}.weights"
    file.write_text(FILES[name])
    weights.write_bytes(b"")
    return f"{file}:{weights}"


def conditioning(name: str, count: int) -> dict[str, np.ndarray]:
    """Return conditioning arrays of `count` samples of a model, by name."""
    rng = np.random.default_rng(1)
    if name == "sequence":
        observation = rng.standard_normal((count, 2, 5)).astype(np.float32)
        return {"observation": observation, "task": np.arange(count) % 4}
    if name == "upscaler":
        return {"low_res": rng.standard_normal((count, 3, 4, 4)).astype(np.float32)}
    return {}


def write_data(name: str, file: Path, count: int = 16) -> Path:
    """Write standard normal samples of a model with their conditioning to an npz file, and return it."""
    samples = np.random.default_rng(0).standard_normal((count, *SHAPES[name])).astype(np.float32)
    np.savez(file, allow_pickle=False, samples=samples, **conditioning(name, count))
    return file
