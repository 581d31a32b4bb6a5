"""Check that optimum-onnx loads a bundle unchanged and produces the same images as diffusers.

    tiny diffusers pipeline --diffpress export--> bundle --optimum-onnx--> images
             |                                                               |
             +----------------- diffusers --------------> images <-- PSNR ---+

Runs Stable Diffusion and Stable Diffusion XL from the same noise, with the scheduler stored in the bundle.
optimum-onnx needs an older transformers than diffpress, so it runs in its own virtual environment, created by the first
run, and loads the bundle offline. The PSNR of images of other prompts is printed beside each figure for comparison.

    python benchmarks/optimum_reads_bundle.py [--work DIR] [--venv DIR]

Exit code 0: all images reach 60 dB; 1: an image does not, or optimum fails; 2: the environment cannot be created.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]

PINNED = (
    "optimum-onnx[onnxruntime]==0.1.0",
    "optimum==2.1.0",
    "transformers==4.57.6",
    "diffusers==0.39.0",
    "accelerate==1.15.0",
    "onnx==1.23.2",
    "onnxruntime==1.32.0",
    "torch==2.13.0",
)

CLASSES = {"sd": "ORTStableDiffusionPipeline", "sdxl": "ORTStableDiffusionXLPipeline"}
PROMPTS = ["a photo of a cat", "red dog"]
NEGATIVES = ["dog", "a photo"]
STEPS = 3
# (guidance, I/O binding): on CUDA optimum binds buffers by the graphs' dimension names. With binding and without
# guidance optimum is wrong for any graph, since the denoiser's output overwrites the latents; that case is left out.
ROWS = ((1.0, False), (7.5, False), (7.5, True))
ENOUGH_DB = 60.0  # float32 on both sides gives above 100 dB; without guidance other prompts still reach 42 dB


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Compare images of bundles in optimum-onnx with those of the pipelines in diffusers."
    )
    parser.add_argument(
        "--work", type=Path, default=ROOT / "build" / "optimum", help="folder for pipelines and bundles"
    )
    parser.add_argument(
        "--venv", type=Path, help="virtual environment of optimum-onnx, created if missing (default: WORK/venv)"
    )
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # this script runs itself in that environment
    args = parser.parse_args()
    if args.read is not None:
        read_with_optimum(args.read)
        return 0
    work = args.work.resolve()
    python = environment((args.venv or work / "venv").resolve())
    if python is None:
        return 2
    return 0 if all(compare(kind, work / kind, python) for kind in CLASSES) else 1


def compare(kind: str, folder: Path, python: Path) -> bool:
    """Build, export and sample one kind of pipeline in both libraries; print the PSNR of each of ROWS."""
    from tests.pipelines import tiny_pipeline

    folder.mkdir(parents=True, exist_ok=True)
    pipeline, bundle = tiny_pipeline(kind, folder / "pipeline"), folder / "bundle"
    expected, others = sampled_with_diffusers(pipeline, folder / "noise.npy")
    export: list[str | Path] = [sys.executable, "-m", "diffpress", "export", pipeline, "--out", bundle]
    if subprocess.run(export, cwd=ROOT).returncode != 0:
        print(f"{kind}: diffpress export of {pipeline} failed")
        return False
    read: list[str | Path] = [python, "-W", "ignore", __file__, "--read", folder]
    offline = os.environ | {"HF_HUB_OFFLINE": "1"}
    if subprocess.run(read, env=offline).returncode != 0:
        print(f"{kind}: {CLASSES[kind]} failed to load or sample {bundle}")
        return False
    images = np.load(folder / "images.npy")
    passed = True
    for (guidance, bound), right, other, image in zip(ROWS, expected, others, images, strict=True):
        found, wrong = worst_db(right, image), worst_db(right, other)
        passed &= wrong < ENOUGH_DB <= found
        how = "bound" if bound else ""
        print(f"{kind:5} guidance {guidance:3} {how:5}  {found:6.1f} dB   (other prompts {wrong:4.1f} dB)")
    return passed


def worst_db(images: np.ndarray, others: np.ndarray) -> float:
    """Return the lowest PSNR over images [N, H, W, 3] in [0, 1]; NaN if any is NaN."""
    from diffpress.compress.evaluation.metrics import psnr_db

    pairs = zip(images, others, strict=True)
    return float(np.min([psnr_db(image[None], other[None], data_range=1.0) for image, other in pairs]))


def sampled_with_diffusers(pipeline: Path, noise_file: Path) -> tuple[np.ndarray, np.ndarray]:
    """Save the noise; return images [row, N, H, W, 3] in [0, 1] of the prompts and of the prompts reversed."""
    from diffusers import DiffusionPipeline

    from tests.pipelines import noise, sampled

    pipe = DiffusionPipeline.from_pretrained(pipeline)
    latents = noise(pipe, len(PROMPTS))
    np.save(noise_file, latents.numpy())

    def images(prompts: list[str]) -> np.ndarray:
        options: dict[str, Any] = {"steps": STEPS, "negative_prompt": NEGATIVES}
        rows = [sampled(pipe, latents, prompts, guidance_scale=guidance, **options) for guidance, _ in ROWS]
        return np.stack([row.permute(0, 2, 3, 1).numpy() for row in rows])

    return images(PROMPTS), images(PROMPTS[::-1])


def read_with_optimum(folder: Path) -> None:
    """Sample the bundle in `folder` from the saved noise into images.npy [row, N, H, W, 3], in [0, 1]."""
    import torch
    from optimum import onnxruntime

    pipe = getattr(onnxruntime, CLASSES[folder.name]).from_pretrained(folder / "bundle")
    pipe.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.load(folder / "noise.npy"))
    height, width = (side * pipe.vae_scale_factor for side in latents.shape[-2:])
    options = {"height": height, "width": width, "num_inference_steps": STEPS, "output_type": "np"}
    images = []
    for guidance, bound in ROWS:
        pipe.use_io_binding = bound
        arguments = {"negative_prompt": NEGATIVES, "latents": latents.clone(), "guidance_scale": guidance}
        images.append(pipe(PROMPTS, **arguments, **options).images)
    np.save(folder / "images.npy", np.stack(images))


def environment(venv: Path) -> Path | None:
    """Create the virtual environment with PINNED if needed and return its Python; None on failure."""
    python, installed = venv / ("Scripts" if os.name == "nt" else "bin") / "python", venv / "pinned.txt"
    pins = "\n".join(PINNED)
    if installed.is_file() and installed.read_text() == pins:
        return python
    print(f"creating {venv}")
    commands: list[list[str | Path]] = [
        [sys.executable, "-m", "venv", venv],
        [python, "-m", "pip", "install", "-q", *PINNED],
    ]
    for command in commands:
        if subprocess.run(command).returncode != 0:
            print(f"{venv}: cannot be created; see the output of {command[0]} above", file=sys.stderr)
            return None
    installed.write_text(pins)
    return python


if __name__ == "__main__":
    sys.exit(main())
