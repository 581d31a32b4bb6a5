"""Memory, time and parity at full model size: U-Nets of Stable Diffusion 1.5 (860M) and SDXL (2.6B), no download.

    python benchmarks/real_size.py sd15     int8 PTQ of weights and activations (8 steps with guidance), export
    python benchmarks/real_size.py sdxl     the same with 4 steps, held in bf16
    python benchmarks/real_size.py sd15 --scale small      a minute: the same steps on a network of 0.8M parameters

Memory and time do not depend on weight values, but parity does: with random weights a trajectory is chaotic, and its
SQNR says nothing. So the network predicts something. Its residual branches are damped, and its last convolution is
fitted by ridge regression to v = alpha eps - sigma x_0 of smooth Gaussian fields x_0, which need no data either:

    W = argmin sum |W f(x_t, t) - v|^2 + lambda |W|^2       f: inputs of the last layer, 3 x 3 patches of C channels

Each step runs in a process of its own and is not repeated in the same --work. Prints one JSON line for each, with its
seconds and the peak resident memory of the process (VmHWM, which includes mapped files). Ends with exit code 1 if a
gate failed; the bundle is kept.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
SMALL: dict[str, Any] = {
    "sample_size": 16,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "attention_head_dim": 4,
    "cross_attention_dim": 32,
}
SMALL_BLOCKS = {
    "sd15": {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
    "sdxl": {
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2),
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 64,
    },
}
SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "clip_sample": False,
    "prediction_type": "v_prediction",
}
# config, dtype of the weights, steps that the model is quantized and sampled with
MODELS = {"sd15": (SD15, "float32", 8), "sdxl": (SDXL, "bfloat16", 4)}

GUIDANCE = 7.5
# last layers of residual branches, scaled so that no block changes its input much
DAMPED, DAMPING = ("conv2.weight", "to_out.0.weight", "ff.net.2.weight", "proj_out.weight"), 0.1
POSITIONS = 2**17  # pixels that the last layer is fitted to
SHOWN = 256  # other pixels, of each timestep and side
FIT_SIDES = (16, 64)  # of latents; parity is checked on 16 x 16
FIT_BATCH = 4
RIDGE = 1e-3  # lambda, relative to the mean square of a feature
CORRELATION = 4.0  # length of the Gaussian fields, in latent cells
LAST = "conv_out"


def config_of(name: str, scale: str) -> dict[str, Any]:
    """Return the U-Net's config."""
    config = MODELS[name][0]
    return config if scale == "full" else {**config, **SMALL, **SMALL_BLOCKS[name]}


def write(name: str, scale: str, folder: Path) -> dict[str, Any]:
    """Write the model's config and damped random weights, in the dtype it is usually stored in."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    dtype = getattr(torch, MODELS[name][1])
    with init_empty_weights():
        model = UNet2DConditionModel(**config_of(name, scale))
    generator, state = torch.Generator().manual_seed(0), {}
    for key, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            weight = torch.randn(tensor.shape, generator=generator).div_(tensor[0].numel() ** 0.5)
        else:
            weight = torch.ones(tensor.shape) if key.endswith("weight") else torch.zeros(tensor.shape)
        state[key] = weight.mul_(DAMPING if key.endswith(DAMPED) else 1.0).to(dtype)
    (folder / "unet").mkdir(parents=True)
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER))
    text = json.dumps(dict(model.config) | {"_class_name": "UNet2DConditionModel"})
    (folder / "unet" / "config.json").write_text(text)
    save_file(state, weights_of(folder))
    return {"parameters": sum(tensor.numel() for tensor in state.values())}


def fit(name: str, scale: str, folder: Path) -> dict[str, Any]:
    """Fit the last layer and store it in the weights; return the explained share of v at each timestep."""
    checkpoint = loaded(name, folder)
    last = checkpoint.model.get_submodule(LAST)
    size = 9 * last.in_channels + 1
    gram, cross = np.zeros((size, size)), np.zeros((size, last.out_channels))
    held_out = {}
    for t, side, v, features in fitting_states(checkpoint, config_of(name, scale)["sample_size"]):
        patches, target = patches_of(features), v.transpose(0, 2, 3, 1).reshape(-1, v.shape[1])
        # the last sample of each timestep and side is not fitted: it shows what was learned
        count = side * side
        held_out[t, side] = (patches[-count:][:SHOWN].copy(), target[-count:][:SHOWN])
        gram += patches[:-count].T @ patches[:-count]
        cross += patches[:-count].T @ target[:-count]
    solved = np.linalg.solve(gram + RIDGE * np.trace(gram) / size * np.eye(size), cross)
    weight = solved[:-1].reshape(3, 3, last.in_channels, last.out_channels).transpose(3, 2, 0, 1)
    overwrite(weights_of(folder), {f"{LAST}.weight": weight, f"{LAST}.bias": solved[-1]})
    explained = {
        f"t = {t:g}, {side} x {side}": round(1.0 - float(((p @ solved - y) ** 2).mean() / (y**2).mean()), 3)
        for (t, side), (p, y) in held_out.items()
    }
    return {"positions": int(gram[-1, -1]), "explained_on_other_samples": explained}


def fitting_states(checkpoint: Any, sample_size: int) -> Iterator[tuple[float, int, np.ndarray, np.ndarray]]:
    """Yield (t, side, v, inputs of the last layer) for each timestep of the plan and side of the latents."""
    from dataclasses import replace

    from diffpress.compress.models.torch_network import TorchNetwork
    from diffpress.runtime.network_inputs import dummy_conditioning, network_conditioning, network_feed
    from diffpress.runtime.noise_schedule import noise_level_at

    spec, generator = checkpoint.spec, np.random.default_rng(0)
    inputs: list[np.ndarray] = []
    hook = checkpoint.model.get_submodule(LAST).register_forward_pre_hook(
        lambda layer, arguments: inputs.append(arguments[0].float().numpy())
    )
    sides = sorted({min(side, sample_size) for side in FIT_SIDES})
    for t in spec.plan.timesteps:
        for side in sides:
            shape = (spec.sample_shape[0], side, side)
            network = TorchNetwork(checkpoint.model, replace(spec, sample_shape=shape))
            samples = 1 + max(1, POSITIONS // (side * side * len(sides) * spec.plan.steps))
            level = noise_level_at(spec.schedule, t)
            x0, noise = gaussian_fields(generator, samples, shape), generator.standard_normal((samples, *shape))
            x = (level.alpha * x0 + level.sigma * noise).astype(np.float32)
            inputs.clear()
            for start in range(0, samples, FIT_BATCH):
                part = x[start : start + FIT_BATCH]
                conditions = network_conditioning(spec, dummy_conditioning(spec, len(part)), guided=False)
                network.run(network_feed(network, spec, part, t, conditions, 1.0))
            yield t, side, level.alpha * noise - level.sigma * x0, np.concatenate(inputs)
    hook.remove()


def gaussian_fields(generator: np.random.Generator, samples: int, shape: tuple[int, ...]) -> np.ndarray:
    """Return smooth Gaussian fields [samples, *shape] of unit variance on a torus."""
    _, height, width = shape
    rows, columns = np.meshgrid(np.fft.fftfreq(height), np.fft.fftfreq(width), indexing="ij")
    amplitude = np.exp(-((np.pi * CORRELATION) ** 2) * (rows**2 + columns**2) / 2)
    amplitude *= np.sqrt(height * width / (amplitude**2).sum())
    noise = generator.standard_normal((samples, *shape))
    return np.fft.ifft2(np.fft.fft2(noise) * amplitude).real


def patches_of(features: np.ndarray) -> np.ndarray:
    """Return the 3 x 3 patches of [N, C, H, W] and a constant, float64 [N H W, 9 C + 1]."""
    padded = np.pad(features, ((0, 0), (0, 0), (1, 1), (1, 1)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(2, 3))  # [N, C, H, W, 3, 3]
    flat = windows.transpose(0, 2, 3, 4, 5, 1).reshape(-1, 9 * features.shape[1])
    return np.concatenate([flat, np.ones((len(flat), 1))], axis=1, dtype=np.float64)


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


def quantize(name: str, scale: str, folder: Path) -> dict[str, Any]:
    """Load the model, quantize weights and activations to int8, and save the checkpoint."""
    from diffpress.compress.checkpoint import save_checkpoint
    from diffpress.compress.context import Context
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.quantization.quantize import quantize as quantize_stage

    checkpoint = loaded(name, folder)
    context = Context(0, folder.with_name(f"{folder.name}-work"), checkpoint)
    quantized = quantize_stage(checkpoint, QuantizeConfig(samples=1, batch=1), context)
    save_checkpoint(quantized, int8_folder(folder))
    return context.notes


def export(name: str, scale: str, folder: Path) -> dict[str, Any]:
    """Export the quantized model, with parity in torch and the engines; a bundle that fails is kept."""
    import torch

    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.export.bundle import export_bundle

    checkpoint = load_checkpoint(int8_folder(folder), dtype=getattr(torch, MODELS[name][1]))
    bundle = export_bundle(checkpoint, folder.with_name(f"{folder.name}-bundle"), keep_failed=True)
    failures = [entry["message"] for entry in bundle.manifest.get("parity_failures", []) if entry["target"]]
    return {"parity": bundle.manifest["parity"], "failures": failures}


def loaded(name: str, folder: Path) -> Any:
    """Load the model with the plan that it is quantized and sampled under."""
    import torch

    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.runtime.sampling_plan import make_plan

    checkpoint = load_checkpoint(folder, dtype=getattr(torch, MODELS[name][1]))
    plan = make_plan("dpmpp_2m", MODELS[name][2], checkpoint.spec.schedule, guidance=GUIDANCE, clip=False)
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))


def weights_of(folder: Path) -> Path:
    return folder / "unet" / "diffusion_pytorch_model.safetensors"


def int8_folder(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}-int8")


WORK: dict[str, Callable[[str, str, Path], dict[str, Any]]] = {
    "write": write,
    "fit": fit,
    "quantize": quantize,
    "export": export,
}


def run_step(step: str, name: str, scale: str, folder: Path) -> dict[str, Any]:
    """Run one step in this process and store its row; `write` starts anew after an interrupted attempt."""
    from diffpress.runtime.benchmarking.probe import peak_mib

    if step == "write":
        shutil.rmtree(folder, ignore_errors=True)
    start = time.perf_counter()
    result = WORK[step](name, scale, folder)
    peak = peak_mib()
    row = {
        "model": name,
        "step": step,
        "seconds": round(time.perf_counter() - start, 1),
        "peak_mib": None if peak is None else round(peak),
        "weights_mib": round(weights_of(folder).stat().st_size / 2**20),
        **result,
    }
    row_of(step, folder).write_text(json.dumps(row))
    return row


def row_of(step: str, folder: Path) -> Path:
    """Return the file that holds the row of a finished step."""
    return folder.with_name(f"{folder.name}-{step}.json")


def main() -> int:
    """Run all steps that are not done, each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--scale", choices=("full", "small"), default="full", help="size of the network (full)")
    parser.add_argument(
        "--work", type=Path, help="folder for weights, checkpoint and bundle, needs 40 GB (default: a temporary one)"
    )
    parser.add_argument("--step", choices=tuple(WORK), help=argparse.SUPPRESS)  # of a child process
    args = parser.parse_args()
    if args.step:
        run_step(args.step, args.model, args.scale, args.work)
        return 0
    from diffpress.runtime.benchmarking.bench import machine

    facts = machine()
    vnni = any("vnni" in name for name in facts["instruction_sets"])
    print(json.dumps({"cpu": facts["cpu"], "cores": facts["cores"], "vnni": vnni}), flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (args.work or Path(temporary)) / (args.model if args.scale == "full" else f"{args.model}-small")
        row: dict[str, Any] = {}
        for step in WORK:
            done = row_of(step, folder).is_file()
            if not done:
                command = [sys.executable, __file__, args.model, "--scale", args.scale]
                subprocess.run([*command, "--work", str(folder), "--step", step], check=True, stdout=sys.stderr)
            row = json.loads(row_of(step, folder).read_text())
            print(json.dumps(row | ({"done_before": True} if done else {})), flush=True)
    return 1 if row["failures"] else 0


if __name__ == "__main__":
    sys.exit(main())
