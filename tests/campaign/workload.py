"""The work that faults are injected into: a tiny class-conditional U-Net and recipes that have every kind of stage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from diffpress.runtime.bundle import load_bundle

# Few-step kinds exclude each other, so that each is one recipe.
FEW_STEPS = {
    "trajectory": "{sample_steps: 2, trajectories: 8, trajectory_steps: 4, steps: 4, batch: 4, save_every: 2}",
    "progressive": "{start_steps: 4, sample_steps: 2, steps: 2, batch: 4, save_every: 1}",
    "consistency": "{sample_steps: 2, stages: 2, steps: 4, batch: 4, save_every: 2}",
    "score": "{sample_steps: 1, score_steps: 1, steps: 2, batch: 4, save_every: 1}",
}
RECIPE = """seed: 3
data: images.npz
stages:
  - prune: {method: taylor, ratio: 0.3, round_to: 4, batch: 4, timesteps: 2}
  - distill: {kind: recover, steps: 4, batch: 4, save_every: 2}
  - distill: {kind: guidance, weight: 2.0, steps: 4, batch: 4, save_every: 2}
  - schedule: {solver: ddim, steps: 3, search: gits, samples: 4, fine: 8, batch: 4}
  - distill: {kind: KIND, SETTINGS}
  - quantize: {format: int8, samples: 4, batch: 4, qat: {steps: 4, trajectories: 4, save_every: 2}}
export: {targets: [onnx, openvino], revert_slower: true, threads: 1}
evaluate: {samples: 8, seeds: 1, batch: 8, features: FEATURES}
"""
# A short recipe, for what is repeated hundreds of times
LIGHT = """seed: 3
data: images.npz
stages:
  - prune: {method: magnitude, ratio: 0.3, round_to: 4}
  - distill: {kind: recover, steps: 2, batch: 4, save_every: 1}
  - quantize: {format: int8, samples: 4, batch: 4}
export: {targets: [onnx], threads: 1}
"""


def make_project(folder: Path) -> Path:
    """Write the checkpoint `teacher`, `images.npz`, a recipe per few-step kind and `light`; return the folder."""
    from diffpress.compress.checkpoint import save_checkpoint
    from tests.compress.conftest import make_unet

    save_checkpoint(make_unet(classes=4), folder / "teacher")
    rng = np.random.default_rng(0)
    np.savez(folder / "images.npz", x=rng.integers(0, 256, (16, 8, 8), np.uint8), y=np.arange(16) % 3)
    _write_features(folder / "features.onnx")
    (folder / "light.yaml").write_text(LIGHT)
    for kind, settings in FEW_STEPS.items():
        text = RECIPE.replace("KIND, SETTINGS", f"{kind}, {settings.strip('{}')}").replace("FEATURES", "features.onnx")
        (folder / f"{kind}.yaml").write_text(text)
    return folder


def _write_features(file: Path) -> None:
    """Write a feature network for the Fréchet distance: random projections of 8x8 images."""
    import torch
    from torch import nn

    torch.manual_seed(1)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 4))
    torch.onnx.export(
        network, (torch.zeros(2, 1, 8, 8),), file, input_names=["sample"], output_names=["features"],
        dynamic_axes={"sample": {0: "N"}, "features": {0: "N"}}, dynamo=False,
    )  # fmt: skip


def compress_words(project: Path, kind: str, out: Path) -> list[str]:
    """Return the command line that runs the recipe of a few-step kind to the folder `out`."""
    words = ("compress", project / "teacher", "--recipe", project / f"{kind}.yaml", "--out", out)
    return [str(word) for word in words]


def result_of(out: Path) -> dict[str, str]:
    """Return what two runs of one recipe must agree in: the hashes of all checkpoints and bundles."""
    found = {name: load_bundle(out / name).hash for name in ("bundle", "baseline")}
    for folder in sorted((out / "stages").glob("[0-9]*")):
        found[folder.name] = json.loads((folder / "diffpress.json").read_text())["hash"]
    return found


def leftovers(out: Path) -> list[str]:
    """Return the temporary files and folders below `out`."""
    return sorted(str(path.relative_to(out)) for path in out.rglob(".*"))
