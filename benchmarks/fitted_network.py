"""Networks of real size that predict something, without trained weights: random features and a fitted last layer.

Memory and time do not depend on weight values, but SQNR does: with random weights a trajectory is chaotic. So the last
layer is fitted by ridge regression to v = alpha eps - sigma x_0 of smooth Gaussian fields x_0, which need no data:

    W = argmin sum |W f(x_t, t) - v|^2 + lambda |W|^2       f: rows of the last layer's input

A row is a 3 x 3 patch of C channels for a convolution and a token of C channels for a linear layer, which predicts a
patch of v. R^2 = 1 - sum |W f - v|^2 / sum |v|^2 is measured on states of samples that were not fitted.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from real_size_models import Model

if TYPE_CHECKING:
    import torch

    from diffpress.compress.checkpoint import Checkpoint

# alpha^2 = exp(-1000 beta) = 0.1 at the last timestep: at the noise levels of Stable Diffusion (0.005) x_0 is barely
# predictable, and the best linear v would change more with t than random features do
BETA = 0.0023
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "linear",
    "beta_start": BETA,
    "beta_end": BETA,
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
# last layers of residual branches, scaled so that no block changes its input much
DAMPED, DAMPING = ("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight"), 0.3
POSITIONS = 2**17  # pixels that the last layer is fitted to
HELD_OUT = 2**12  # pixels of other samples, of each timestep and side; R^2 is measured on ROWS of their rows
ROWS = 512
BATCH = 4
RIDGE = 1e-3  # lambda, relative to the mean square of a feature
CORRELATION = 8.0  # length of the Gaussian fields, in latent cells


class FittingStates(NamedTuple):
    """States of one timestep and side: v [N, C, side, side] and the last layer's input [N, ...]."""

    t: float
    side: int
    v: np.ndarray
    features: np.ndarray


def write_network(model: Model, small: bool, folder: Path) -> dict[str, Any]:
    """Write a diffusers folder of the network with damped random weights; an existing folder is replaced."""
    import diffusers
    import torch
    from accelerate import init_empty_weights
    from safetensors.torch import save_file

    with init_empty_weights():
        network = getattr(diffusers, model.kind)(**model.config | (model.small if small else {}))
    generator, dtype, state = torch.Generator().manual_seed(0), getattr(torch, model.dtype), {}
    for key, tensor in network.state_dict().items():
        weight = random_tensor(key, tensor.shape, generator)
        state[key] = weight.mul_(DAMPING if key.endswith(DAMPED) else 1.0).to(dtype)
    shutil.rmtree(folder, ignore_errors=True)
    (folder / model.component).mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    config = dict(network.config) | {"_class_name": model.kind}
    (folder / model.component / "config.json").write_text(json.dumps(config))
    save_file(state, weights_file(model, folder))
    return {"parameters": sum(tensor.numel() for tensor in state.values())}


def random_tensor(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """Return variance-preserving random weights; scales are 1 and biases 0, so that norms are the identity."""
    import torch

    if len(shape) > 1:
        return torch.randn(shape, generator=generator).div_(shape[1:].numel() ** 0.5)
    return torch.full(shape, float(name.endswith("weight")))


def weights_file(model: Model, folder: Path) -> Path:
    """Return the file of the network's weights in its diffusers folder."""
    return folder / model.component / "diffusion_pytorch_model.safetensors"


def load_network(model: Model, folder: Path, dtype: str | None = None) -> Checkpoint:
    """Load the network, by default in the type it is stored in, with the plan that it is quantized and sampled under.

    Args:
        model: The model.
        folder: Its diffusers folder.
        dtype: Type of the weights in memory.
    """
    import torch

    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.runtime.sampling_plan import make_plan

    checkpoint = load_checkpoint(folder, dtype=getattr(torch, dtype or model.dtype))
    plan = make_plan("dpmpp_2m", model.steps, checkpoint.spec.schedule, guidance=model.guidance, clip=False)
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))


def fit_network(model: Model, folder: Path) -> dict[str, Any]:
    """Fit the last layer and store it in the weights file; return R^2 on unseen states, in total and by timestep."""
    checkpoint = load_network(model, folder)
    last = checkpoint.model.get_submodule(model.last)
    gram, cross = np.zeros(()), np.zeros(())
    held_out = {}
    for t, side, v, features in fitting_states(model, checkpoint):
        count, rows, targets = held_out_samples(side), rows_of(features), targets_of(v, features)
        first = len(rows) - count * len(rows) // len(v)  # the last samples are not fitted
        picked = first + np.random.default_rng(0).permutation(len(rows) - first)[:ROWS]
        held_out[t, side] = (rows[picked], targets[picked])
        gram, cross = gram + rows[:first].T @ rows[:first], cross + rows[:first].T @ targets[:first]
    solution = np.linalg.solve(gram + RIDGE * np.trace(gram) / len(gram) * np.eye(len(gram)), cross)
    weight, bias = fitted_layer(last, solution, checkpoint.spec.sample_shape[0])
    overwrite(weights_file(model, folder), {f"{model.last}.weight": weight, f"{model.last}.bias": bias})
    by_state = {f"t = {t:g}, {side} x {side}": r2([rows], solution) for (t, side), rows in held_out.items()}
    return {"positions": int(gram[-1, -1]), "r2": r2(list(held_out.values()), solution), "r2_by_state": by_state}


def r2(held_out: list[tuple[np.ndarray, np.ndarray]], solution: np.ndarray) -> float:
    """Return the explained share of the mean square of all targets, given (rows, targets) pairs."""
    error = sum(float(((rows @ solution - targets) ** 2).sum()) for rows, targets in held_out)
    return round(1.0 - error / sum(float((targets**2).sum()) for _, targets in held_out), 3)


def fitting_states(model: Model, checkpoint: Checkpoint) -> Iterator[FittingStates]:
    """Yield the states of each timestep of the plan and side of the latents."""
    from dataclasses import replace

    from diffpress.compress.models.torch_network import TorchNetwork
    from diffpress.runtime.network_inputs import dummy_conditioning, network_conditioning, network_feed
    from diffpress.runtime.noise_schedule import noise_level_at

    spec, generator = checkpoint.spec, np.random.default_rng(0)
    inputs: list[np.ndarray] = []
    hook = checkpoint.model.get_submodule(model.last).register_forward_pre_hook(
        lambda layer, arguments: inputs.append(arguments[0].float().numpy())
    )
    sides = sorted({*model.sides, spec.sample_shape[1]})
    for t in spec.plan.timesteps:
        for side in sides:
            shape = (spec.sample_shape[0], side, side)
            network = TorchNetwork(checkpoint.model, replace(spec, sample_shape=shape))
            fitted = max(1, POSITIONS // (side * side * len(sides) * spec.plan.steps))
            samples = fitted + held_out_samples(side)
            level = noise_level_at(spec.schedule, t)
            x0, noise = gaussian_fields(generator, samples, shape), generator.standard_normal((samples, *shape))
            x = (level.alpha * x0 + level.sigma * noise).astype(np.float32)
            inputs.clear()
            for start in range(0, samples, BATCH):
                part = x[start : start + BATCH]
                conditions = network_conditioning(spec, dummy_conditioning(spec, len(part)), guided=False)
                network.run(network_feed(network, spec, part, t, conditions, 1.0))
            yield FittingStates(t, side, level.alpha * noise - level.sigma * x0, np.concatenate(inputs))
    hook.remove()


def held_out_samples(side: int) -> int:
    """Return the number of samples of this side that are not fitted; small fields have few independent values."""
    return max(1, HELD_OUT // (side * side))


def gaussian_fields(generator: np.random.Generator, samples: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return smooth Gaussian fields [samples, *shape] of unit variance on a torus."""
    _, height, width = shape
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = np.exp(-((np.pi * CORRELATION) ** 2) * (rows**2 + columns**2) / 2)
    amplitude *= np.sqrt(height * width / (amplitude**2).sum())
    noise = generator.standard_normal((samples, *shape))
    return np.fft.ifft2(np.fft.fft2(noise) * amplitude).real


def rows_of(features: np.ndarray) -> np.ndarray:
    """Return what the last layer multiplies, and a constant, as float64 rows.

    They are the 3 x 3 patches of [N, C, H, W], [N H W, 9 C + 1], or the tokens of [N, T, C], [N T, C + 1].
    """
    flat = features.reshape(-1, features.shape[-1]) if features.ndim == 3 else _patches(features)
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1, dtype=np.float64)


def _patches(features: np.ndarray) -> np.ndarray:
    padded = np.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [N, C, H, W, 3, 3]
    return windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, 9 * features.shape[1])


def targets_of(v: np.ndarray, features: np.ndarray) -> np.ndarray:
    """Return the part of v [N, C, H, W] that each of `rows_of(features)` predicts: a pixel, or a patch (p, q, c)."""
    count, channels, height, width = v.shape
    patch = round((height * width / features.shape[1]) ** 0.5) if features.ndim == 3 else 1
    tiles = v.reshape(count, channels, height // patch, patch, width // patch, patch)
    return tiles.transpose(0, 2, 4, 3, 5, 1).reshape(-1, patch * patch * channels)


def fitted_layer(last: Any, solution: np.ndarray, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return weight and bias of the last layer with `solution` [rows of the layer's input, outputs] in them.

    Outputs of a linear layer beyond the first `channels` of every pixel, the learned variance, stay as they are.
    """
    if last.weight.dim() == 4:
        kernel = solution[:-1].reshape(3, 3, last.in_channels, last.out_channels)
        return kernel.transpose(3, 2, 0, 1), solution[-1]
    weight, bias = last.weight.detach().float().numpy().copy(), last.bias.detach().float().numpy().copy()
    pixels = solution.shape[1] // channels
    fitted = np.arange(len(bias)).reshape(pixels, -1)[:, :channels].ravel()
    weight[fitted], bias[fitted] = solution[:-1].T, solution[-1]
    return weight, bias


def overwrite(file: Path, tensors: dict[str, np.ndarray]) -> None:
    """Replace tensors of a .safetensors file in place, in their dtype."""
    import torch

    with file.open("r+b") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        for name, values in tensors.items():
            dtype = {"F32": torch.float32, "BF16": torch.bfloat16}[header[name]["dtype"]]
            data = torch.from_numpy(np.ascontiguousarray(values)).to(dtype).view(torch.uint8).numpy().tobytes()
            start, end = header[name]["data_offsets"]
            assert len(data) == end - start, name
            stream.seek(8 + length + start)
            stream.write(data)
