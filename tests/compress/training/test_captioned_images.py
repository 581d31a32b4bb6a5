"""compress/training/captioned_images.py: images encoded by the pipeline's autoencoder, captions by its text encoder."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import load_file, save_file

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.components import encode_prompts
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.captioned_images import CaptionedImages, load_captioned_images
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.runtime.errors import InvalidInputError

CAPTIONS = ["a cat", "red dog", "blue bird"]


@pytest.fixture
def teacher(tiny_folder: Callable[..., Path]) -> Checkpoint:
    return load_checkpoint(tiny_folder("sd"))


@pytest.fixture
def pixels(teacher: Checkpoint) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, *teacher.spec.image_size, 3)).astype(np.uint8)


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def save(**arrays: object) -> Path:
        np.savez(tmp_path / "images.npz", **arrays)  # type: ignore[arg-type]
        return tmp_path / "images.npz"

    return save


@pytest.fixture
def data(teacher: Checkpoint, pixels: np.ndarray, write: Callable[..., Path], tmp_path: Path) -> CaptionedImages:
    return load_captioned_images(write(x=pixels, caption=CAPTIONS), teacher, tmp_path)


def test_images_are_encoded_as_diffusers_encodes_them_each_with_its_caption(
    data: CaptionedImages, pixels: np.ndarray, tiny_folder: Callable[..., Path]
) -> None:
    vae = StableDiffusionPipeline.from_pretrained(tiny_folder("sd")).vae
    scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        expected = vae.encode(scaled).latent_dist.mode() * vae.config.scaling_factor
    states = torch.from_numpy(encode_prompts(data.teacher, CAPTIONS)["encoder_hidden_states"])
    samples, cond = data.batch(16, torch.Generator().manual_seed(0))
    assert samples.shape == (16, *data.teacher.spec.sample_shape)
    found = set()
    for sample, words in zip(samples, cond["encoder_hidden_states"], strict=True):
        index = int((expected - sample).flatten(1).norm(dim=1).argmin())
        torch.testing.assert_close(sample, expected[index], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(words, states[index], atol=1e-5, rtol=1e-5)
        found.add(index)
    assert found == {0, 1, 2}


def test_images_are_encoded_once(data: CaptionedImages, monkeypatch: pytest.MonkeyPatch) -> None:
    samples, _ = data.batch(4, torch.Generator().manual_seed(0))
    (file,) = data.folder.glob("images-*.npy")
    monkeypatch.setattr("diffpress.compress.training.captioned_images.encode_images", lambda *_: pytest.fail("again"))
    again = CaptionedImages(data.teacher, data.images, data.prompts, data.hash, data.folder)
    assert torch.equal(again.batch(4, torch.Generator().manual_seed(0))[0], samples)
    file.write_bytes(b"damaged")
    damaged = CaptionedImages(data.teacher, data.images, data.prompts, data.hash, data.folder)
    with pytest.raises(InvalidInputError, match="delete it to generate it again"):
        damaged.batch(4, torch.Generator())


def test_captions_condition_calibration_in_turn(data: CaptionedImages) -> None:
    cond = data.conditions(4).cond["encoder_hidden_states"]
    np.testing.assert_allclose(cond[3], cond[0])
    np.testing.assert_allclose(cond[:3], encode_prompts(data.teacher, CAPTIONS)["encoder_hidden_states"], atol=1e-5)
    uncond = encode_prompts(data.teacher, None)["encoder_hidden_states"]
    np.testing.assert_allclose(data.uncond["encoder_hidden_states"], uncond, atol=1e-5)


def test_captions_are_prompts_too(write: Callable[..., Path], pixels: np.ndarray) -> None:
    assert read_prompts(write(x=pixels, caption=CAPTIONS)) == tuple(CAPTIONS)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda x: {"x": x}, "'caption' is missing"),
        (lambda x: {"caption": CAPTIONS}, "no array 'x'"),
        (lambda x: {"x": x, "caption": CAPTIONS[:2]}, "2 captions for 3 images"),
        (lambda x: {"x": x, "caption": [1, 2, 3]}, "'caption' is int64 [3]"),
        (lambda x: {"x": x[:, :8], "caption": CAPTIONS}, "the model expects [3,"),
        (lambda x: {"x": x[..., 0], "caption": CAPTIONS}, "the model expects [3,"),
        (lambda x: {"x": x.astype(np.float32), "caption": CAPTIONS}, "expected uint8"),
    ],
)
def test_files_that_do_not_fit_are_refused(
    change: Callable[..., dict[str, object]],
    words: str,
    teacher: Checkpoint,
    pixels: np.ndarray,
    write: Callable[..., Path],
    tmp_path: Path,
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        load_captioned_images(write(**change(pixels)), teacher, tmp_path)
    assert words in str(caught.value) and "images.npz" in str(caught.value) and "\n" not in str(caught.value)


def test_an_autoencoder_without_its_encoder_is_refused(
    tiny_folder: Callable[..., Path], pixels: np.ndarray, write: Callable[..., Path], tmp_path: Path
) -> None:
    folder = tmp_path / "sd"
    shutil.copytree(tiny_folder("sd"), folder)
    weights = folder / "vae" / "diffusion_pytorch_model.safetensors"
    kept = {k: v for k, v in load_file(weights).items() if not k.startswith(("encoder.", "quant_conv."))}
    save_file(kept, weights, metadata={"format": "pt"})
    file = write(x=pixels, caption=CAPTIONS)
    with pytest.raises(InvalidInputError, match="no weights of the encoder"):
        load_captioned_images(file, load_checkpoint(folder), tmp_path)
    with pytest.raises(InvalidInputError, match="came without its text encoders"):
        load_captioned_images(file, load_checkpoint(folder / "unet"), tmp_path)


def test_another_autoencoder_encodes_again(
    data: CaptionedImages,
    pixels: np.ndarray,
    write: Callable[..., Path],
    tmp_path: Path,
    tiny_folder: Callable[..., Path],
) -> None:
    before, _ = data.batch(4, torch.Generator().manual_seed(0))
    shutil.copytree(tiny_folder("sd"), tmp_path / "sd")
    weights = tmp_path / "sd" / "vae" / "diffusion_pytorch_model.safetensors"
    save_file({k: 1.5 * v for k, v in load_file(weights).items()}, weights, metadata={"format": "pt"})
    images = data.images.transpose(0, 2, 3, 1)
    other = load_captioned_images(write(x=images, caption=CAPTIONS), load_checkpoint(tmp_path / "sd"), tmp_path)
    assert other.hash == data.hash and other.teacher.hash == data.teacher.hash
    assert not torch.equal(other.batch(4, torch.Generator().manual_seed(0))[0], before)
