"""examples/pretrain_text_to_image.py: three tiny stages write a pipeline, and a stopped run resumes exactly."""

import shutil
import string
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel

from diffpress.compress.sources.load import load_checkpoint
from tests.examples.made_icons import save_icons

STAGES = ("autoencoder", "text_encoder", "denoiser")


@pytest.fixture(scope="module")
def pretrain(examples: None) -> Iterator[ModuleType]:
    import pretrain_text_to_image

    with pytest.MonkeyPatch.context() as patch:
        for name in ("GRID_STEPS", "GRID_ROWS"):  # image grids would take longer than training
            patch.setattr(pretrain_text_to_image, name, 1)
        yield pretrain_text_to_image


@pytest.fixture(scope="module")
def icons(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("icons") / "icons.npz"
    save_icons(path)
    return path


@pytest.fixture(scope="module")
def teacher(pretrain: ModuleType, icons: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline after two steps of each stage."""
    out = tmp_path_factory.mktemp("teacher")
    for stage in STAGES:
        run(pretrain, stage, icons, out, "--steps", "2")
    return out


def run(pretrain: ModuleType, stage: str, icons: Path, out: Path, *options: str) -> None:
    pretrain.main([stage, "--icons", str(icons), "--out", str(out), "--batch", "4", "--device", "cpu", *options])


def test_three_stages_write_a_pipeline_that_diffusers_and_diffpress_load(teacher: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(teacher)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("flat red square on blue", num_inference_steps=1, output_type="np").images
    assert images.shape == (1, 64, 64, 3) and np.isfinite(images).all()
    spec = load_checkpoint(teacher).spec
    assert spec.prediction == "v" and spec.conditioning.kind == "text" and spec.latent_scale is not None
    assert len(list((teacher / "samples").glob("*.png"))) == len(STAGES)


def test_the_networks_have_at_most_25_megabytes_in_half_precision(pretrain: ModuleType) -> None:
    words = [f"{first}{second}" for first in string.ascii_lowercase for second in string.ascii_letters * 2]
    tokenizer = pretrain.build_tokenizer(words * 3)
    models = (pretrain.build_unet(), pretrain.build_autoencoder(), pretrain.build_text_encoder(tokenizer))
    assert 2 * sum(parameter.numel() for model in models for parameter in model.parameters()) < 24.5e6


def test_the_tokenizer_encodes_captions_briefly_and_any_other_text(pretrain: ModuleType) -> None:
    captions = [f"{style} red {name} on blue" for style in ("flat", "shaded") for name in ("square", "disc")]
    tokenizer = pretrain.build_tokenizer(captions)
    ids = pretrain.encoded_captions(tokenizer, ["flat red disc on blue", "Zébra 12%, 犬!", ""])
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    assert ids.shape == (3, pretrain.TOKENS) and ids[0, 0] == start and ids[0, 6] == end
    assert tokenizer.decode(ids[1], skip_special_tokens=True).replace(" ", "") == "zébra12%,犬!"
    assert ids[2].tolist() == [start, *[end] * (pretrain.TOKENS - 1)]


def test_no_held_out_combination_is_drawn_and_all_others_are(pretrain: ModuleType, icons: Path) -> None:
    loaded = pretrain.load_icons(icons)
    training = np.isin(np.arange(loaded.combinations), loaded.training()).reshape(-1, 8)
    data = pretrain.Data(loaded, training, icons.parent, torch.device("cpu"))
    drawn = np.concatenate([pretrain.draw(data, 256, seed=0, step=step)[0] for step in range(40)])
    assert sorted(set(drawn)) == loaded.training().tolist()
    assert np.mean(drawn % 8 == 0) == pytest.approx(pretrain.WHITE, abs=0.02)


def test_a_resumed_denoiser_equals_an_uninterrupted_one_bit_for_bit(
    pretrain: ModuleType, icons: Path, teacher: Path, tmp_path: Path
) -> None:
    weights = []
    for name, runs in (("whole", [["--steps", "4"]]), ("halves", [["--stop-at", "2"], ["--resume"]])):
        out = tmp_path / name
        out.mkdir()
        for component in ("vae", "tokenizer", "text_encoder"):
            shutil.copytree(teacher / component, out / component)
        for options in runs:
            run(pretrain, "denoiser", icons, out, "--steps", "4", *options)
        weights.append(torch.load(out / "denoiser.pt", weights_only=True)["model"])
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_init_starts_from_the_weights_of_a_pipeline(
    pretrain: ModuleType, icons: Path, teacher: Path, tmp_path: Path
) -> None:
    for component in ("vae", "tokenizer", "text_encoder"):
        shutil.copytree(teacher / component, tmp_path / component)
    options = ("--steps", "1", "--lr", "1e-12", "--init", str(teacher))
    run(pretrain, "denoiser", icons, tmp_path, *options)
    before, after = (UNet2DConditionModel.from_pretrained(path / "unet") for path in (teacher, tmp_path))
    assert all(
        torch.allclose(ours, theirs, atol=1e-6)
        for ours, theirs in zip(before.parameters(), after.parameters(), strict=True)
    )


def test_a_stage_needs_what_the_earlier_ones_made(pretrain: ModuleType, icons: Path, tmp_path: Path) -> None:
    for stage, missing in (("text_encoder", "vae"), ("denoiser", "vae")):
        with pytest.raises(SystemExit, match=f"no usable {missing}/"):
            run(pretrain, stage, icons, tmp_path, "--steps", "1")


def test_a_denoiser_is_not_resumed_on_the_latents_of_another_autoencoder(
    pretrain: ModuleType, icons: Path, teacher: Path, tmp_path: Path
) -> None:
    out = shutil.copytree(teacher, tmp_path / "out")
    pretrain.build_autoencoder().save_pretrained(out / "vae")
    with pytest.raises(SystemExit, match="made with other settings"):
        run(pretrain, "denoiser", icons, out, "--steps", "4", "--resume")
