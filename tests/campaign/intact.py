"""Intact inputs of every kind, which the campaigns change: made once, in a folder of their own.

bundle/        pixel model without conditioning (tests/runtime/tiny_bundle)
text_bundle/   Stable Diffusion with tokenizer, text encoder and decoder
pipeline/      folder of a diffusers pipeline, from which text_bundle was exported
checkpoint/    a pruned and quantized checkpoint of an earlier format, with diffpress.json
lora.safetensors, data.npz, image.png, recipe.yaml
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.campaign.forked import command, run_forked

ROOT = Path(__file__).parents[2]


def make_intact(folder: Path) -> Path:
    """Write the intact inputs to `folder` and return it."""
    folder.mkdir(parents=True)
    shutil.copytree(ROOT / "tests" / "runtime" / "tiny_bundle", folder / "bundle")
    shutil.copytree(ROOT / "tests" / "fixtures" / "format_1" / "checkpoint", folder / "checkpoint")
    for action in (lambda: _write_pipeline(folder), lambda: _write_files(folder)):
        made = run_forked(action, folder, limited=False)
        assert made.code == 0, made.err
    words = ["export", folder / "pipeline", "--out", folder / "text_bundle", "--threads", 1]
    exported = run_forked(command([*words, "--targets", "onnx", "openvino"]), folder, limited=False)
    assert exported.code == 0, exported.err
    return folder


def _write_pipeline(folder: Path) -> int:
    from tests.pipelines import tiny_pipeline

    tiny_pipeline("sd", folder / "pipeline")
    return 0


def _write_files(folder: Path) -> int:
    import numpy as np
    import torch
    from PIL import Image
    from safetensors.torch import load_file, save_file

    rng = np.random.default_rng(0)
    np.savez_compressed(folder / "data.npz", x=rng.integers(0, 255, (64, 8, 8), np.uint8))
    Image.fromarray(rng.integers(0, 255, (64, 64, 3), np.uint8)).save(folder / "image.png")
    Image.fromarray(rng.integers(0, 255, (8, 8), np.uint8)).save(folder / "grey.png")
    weights = load_file(folder / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors")
    generator = torch.Generator().manual_seed(0)
    lora = {}
    for name, tensor in weights.items():
        if name.endswith(("to_q.weight", "to_v.weight")):
            layer = f"unet.{name.removesuffix('.weight')}"
            lora[f"{layer}.lora_A.weight"] = torch.randn(2, tensor.shape[1], generator=generator) / 100
            lora[f"{layer}.lora_B.weight"] = torch.randn(tensor.shape[0], 2, generator=generator) / 100
    save_file(lora, folder / "lora.safetensors")
    shutil.copy(ROOT / "diffpress" / "compress" / "recipes" / "smallest.yaml", folder / "recipe.yaml")
    return 0
