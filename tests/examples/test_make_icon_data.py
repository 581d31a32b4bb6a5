"""examples/make_icon_data.py and data_manifest.py: the icons part of the data folder, with a licence for each file."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.numpy import load_file

from diffpress.compress.checkpoint import save_checkpoint
from diffpress.compress.models.components import encode_prompts
from diffpress.compress.sources.load import load_checkpoint
from tests.examples.made_icons import NAMES, save_icons


@pytest.fixture
def scripts(examples: None) -> ModuleType:
    import make_icon_data

    return make_icon_data


def test_it_writes_captioned_images_prompts_and_a_manifest(
    scripts: ModuleType, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    save_icons(tmp_path / "icons.npz")
    icons = scripts.load_icons(tmp_path / "icons.npz")
    out, training = tmp_path / "data", tmp_path / "training.npz"
    words = ("--icons", tmp_path / "icons.npz", "--teacher", tiny_folder("sd"), "--training", training, "--out", out)
    scripts.main([str(word) for word in words])
    lines = {
        name: (out / "icons" / f"{name}.txt").read_text().splitlines() for name in ("prompts", "captions", "names")
    }
    captions = icons.captions()
    assert lines["prompts"] == [captions[one] for one in icons.held_out()]
    assert lines["names"] == sorted(NAMES) and len(lines["captions"]) == len(NAMES)
    assert all(f" {name} on " in caption for name, caption in zip(sorted(NAMES), lines["captions"], strict=True))
    with np.load(out / "icons" / "calibration.npz", allow_pickle=False) as file:
        images, texts = file["x"], file["caption"]
    assert len(images) == len(set(texts.tolist())) == len(icons.training())
    (expected,) = icons.images(np.array([captions.index(texts[0])]))
    assert np.array_equal(images[0], expected.transpose(1, 2, 0)) and set(texts.tolist()).isdisjoint(lines["prompts"])
    with np.load(training, allow_pickle=False) as file:
        assert sorted(file["caption"].tolist()) == sorted(captions[one] for one in icons.training())
        (expected,) = icons.images(np.array([captions.index(file["caption"][5])]))
        assert np.array_equal(file["x"][5], expected.transpose(1, 2, 0))
    manifest = json.loads((out / "MANIFEST.json").read_text())
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert files - {"MANIFEST.json"} == set(manifest)
    half = load_file(out / "icons" / "teacher" / "unet" / "diffusion_pytorch_model.safetensors")
    assert {weight.dtype for weight in half.values()} == {np.dtype(np.float16)}
    plan = load_checkpoint(out / "icons" / "teacher").spec.plan
    assert (plan.solver, plan.steps, plan.guidance) == ("ddim", 50, 2.0)
    pipeline = StableDiffusionPipeline.from_pretrained(out / "icons" / "teacher")
    assert {pipeline.unet.dtype, pipeline.vae.dtype, pipeline.text_encoder.dtype} == {torch.float32}
    assert not any(str(tmp_path.parent) in file.read_text() for file in (out / "icons").rglob("*.json"))


def test_a_student_shares_the_components_of_the_teacher_beside_it(
    scripts: ModuleType, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    scripts.save_teacher(tiny_folder("sd"), tmp_path / "teacher")
    save_checkpoint(load_checkpoint(tiny_folder("sd")), tmp_path / "stage")
    scripts.save_student(tmp_path / "stage", tmp_path / "student")
    assert sorted(path.name for path in (tmp_path / "student").iterdir()) == ["diffpress.json", "scheduler", "unet"]
    loaded = load_checkpoint(tmp_path / "student")
    assert json.loads((tmp_path / "student" / "diffpress.json").read_text())["hash"] == loaded.hash
    found, expected = (encode_prompts(one, ["a cat"]) for one in (loaded, load_checkpoint(tmp_path / "teacher")))
    assert found and all(np.array_equal(found[name], expected[name]) for name in found)


def test_a_file_without_provenance_is_refused(examples: None, tmp_path: Path) -> None:
    import data_manifest

    (tmp_path / "prompts.txt").write_text("a cat")
    assert data_manifest.manifest(tmp_path)["prompts.txt"]["bytes"] == 5
    (tmp_path / "new.bin").write_bytes(b"?")
    with pytest.raises(SystemExit, match="fits 0 entries of PROVENANCE"):
        data_manifest.manifest(tmp_path)
