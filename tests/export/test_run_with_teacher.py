"""export/run.py with a recipe that names a teacher: the report compares the student's bundle with the teacher's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.counts import count
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.run import run_recipe
from diffpress.export.run_bundles import _same_components
from diffpress.runtime.bundle import load_bundle


@pytest.fixture
def student(tiny_folder: Callable[..., Path], tmp_path: Path) -> Checkpoint:
    """A pruned tiny Stable Diffusion, whose other components are the teacher's."""
    teacher = load_checkpoint(tiny_folder("sd"))
    config = PruneConfig(method="magnitude", ratio=0.3, round_to=4)
    return prune(teacher, config, Context(0, tmp_path / "work", teacher))


def test_the_report_compares_the_student_with_its_teacher(
    student: Checkpoint, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\nred dog\n", encoding="utf-8")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"teacher: {tiny_folder('sd')}\ndata: prompts.txt\nexport: {{targets: [onnx], threads: 1}}\n")
    shown: list[str] = []
    run_recipe(lambda: student, Recipe.load(recipe), tmp_path / "out", show=shown.append)
    teacher = load_checkpoint(tiny_folder("sd"))
    ours, theirs = (count(one.model, one.spec).parameters for one in (student, teacher))
    bundle, baseline = (load_bundle(tmp_path / "out" / name) for name in ("bundle", "baseline"))
    assert baseline.manifest["graphs"]["denoiser"]["parameters"] == theirs > ours
    assert bundle.manifest["metrics"]["parameters_ratio"] == pytest.approx(ours / theirs)
    # the components are those of one pipeline, exported once
    for name in ("text_encoder.onnx", "vae_decoder.onnx"):
        assert bundle.manifest["files"][name] == baseline.manifest["files"][name]
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report and "PSNR to the teacher" in "\n".join(shown)
    assert np.isfinite(json.loads((tmp_path / "out" / "evaluation.json").read_text())["bundle"]["paired"]["psnr_db"])


def test_only_the_components_of_one_pipeline_are_the_same(
    student: Checkpoint, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    teacher = load_checkpoint(tiny_folder("sd"))
    save_checkpoint(student, tmp_path / "student")  # with a copy of the components
    assert _same_components(student, teacher)
    assert not _same_components(load_checkpoint(tmp_path / "student"), teacher)
