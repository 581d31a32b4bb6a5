"""compress/sources/autoencoder.py: another autoencoder in place of the pipeline's, such as TAESD, as in diffusers."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, UNet2DConditionModel

import diffpress as dp
from diffpress.cli.main import main
from diffpress.compress.sources.autoencoder import with_decoder
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.against_diffusers import PROMPTS, psnr_db, sampled_by_diffusers, sampled_in_torch, with_short_plan
from tests.image_inputs import pictures, request
from tests.image_inputs import sampled_by_diffusers as image_by_diffusers
from tests.image_inputs import sampled_in_torch as image_in_torch
from tests.pipelines import KINDS, fill_zeros_, tiny_pipeline, tiny_vae, vae

CHANNELS = {"sd": 4, "sdxl": 4, "sd3": 16, "flux": 16}


def saved(autoencoder: Any, folder: Path) -> Path:
    fill_zeros_(autoencoder)
    autoencoder.save_pretrained(folder)
    return folder


@pytest.fixture
def taesd(tmp_path: Path) -> Callable[[int], Path]:
    torch.manual_seed(0)
    return lambda channels: saved(tiny_vae(channels), tmp_path / "taesd")


def opened(folder: Path, decoder: Any) -> Any:
    return DiffusionPipeline.from_pretrained(folder, vae=decoder, local_files_only=True)


@pytest.mark.parametrize("kind", CHANNELS)
def test_a_tiny_autoencoder_decodes_and_encodes_as_the_vae_of_diffusers_pipeline(
    kind: str, tiny_folder: Callable[..., Path], taesd: Callable[[int], Path]
) -> None:
    folder, decoder = tiny_folder(kind), taesd(CHANNELS[kind])
    checkpoint = with_short_plan(with_decoder(load_checkpoint(folder), decoder), steps=3)
    assert (checkpoint.spec.latent_scale, checkpoint.spec.latent_shift) == (1.0, 0.0)
    tiny = type(tiny_vae()).from_pretrained(decoder)
    theirs = sampled_by_diffusers(folder, checkpoint, pipe=opened(folder, tiny))
    assert psnr_db(sampled_in_torch(checkpoint), theirs) >= 90
    images = request((16, 16) if kind != "flux" else (32, 32), 0.7)
    theirs = image_by_diffusers(folder, checkpoint, images, pipe=opened(folder, tiny))
    assert psnr_db(image_in_torch(checkpoint, images), theirs) >= 90


def test_another_kl_autoencoder_brings_its_own_scale(tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    torch.manual_seed(1)
    other = saved(vae(scaling_factor=0.5), tmp_path / "other")
    checkpoint = with_short_plan(with_decoder(load_checkpoint(tiny_folder("sd")), other), steps=2)
    assert checkpoint.spec.latent_scale == 0.5
    theirs = sampled_by_diffusers(
        tiny_folder("sd"), checkpoint, pipe=opened(tiny_folder("sd"), type(vae()).from_pretrained(other))
    )
    assert psnr_db(sampled_in_torch(checkpoint), theirs) >= 90


def test_a_pipeline_whose_own_autoencoder_is_tiny_is_loaded(tmp_path: Path) -> None:
    def build() -> Any:
        pipe = KINDS["sd"]()
        pipe.register_modules(vae=tiny_vae())
        return pipe

    folder = tiny_pipeline(build, tmp_path / "sd")
    checkpoint = with_short_plan(load_checkpoint(folder), steps=3)
    assert psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(folder, checkpoint)) >= 90
    images = request((16, 16), 0.7)
    theirs = image_by_diffusers(folder, checkpoint, images)
    assert psnr_db(image_in_torch(checkpoint, images), theirs) >= 90


def test_the_command_exports_it_with_its_licence(
    tiny_folder: Callable[..., Path], taesd: Callable[[int], Path], tmp_path: Path
) -> None:
    decoder, out = taesd(4), tmp_path / "bundle"
    (decoder / "LICENSE").write_text("as it is\n")
    words = ("export", tiny_folder("sd"), "--decoder", decoder, "--image-inputs", "--out", out, "--threads", 1)
    assert main([str(word) for word in words]) == 0
    bundle = dp.load_bundle(out)
    assert (out / "vae_decoder.LICENSE").read_text() == "as it is\n"
    assert json.loads((out / "vae_decoder" / "config.json").read_text())["_class_name"] == "AutoencoderTiny"
    outputs = bundle.manifest["graphs"]["vae_encoder"]["outputs"]["latent_parameters"]
    assert outputs["shape"][1] == 4  # no distribution

    folder, tiny = tiny_folder("sd"), type(tiny_vae()).from_pretrained(decoder)
    checkpoint = with_short_plan(with_decoder(load_checkpoint(folder), decoder), steps=4)
    with dp.Pipeline(out, engine="onnxruntime", threads=1) as pipe:
        plain: Any = pipe(PROMPTS, steps=4)
        started: Any = pipe(PROMPTS, image=pictures((16, 16)), strength=0.6, steps=4)
    theirs = sampled_by_diffusers(folder, checkpoint, pipe=opened(folder, tiny))
    assert psnr_db(arrays(plain), theirs) >= 40
    theirs = image_by_diffusers(folder, checkpoint, request((16, 16), 0.6), pipe=opened(folder, tiny))
    assert psnr_db(arrays(started), theirs) >= 40


def arrays(images: Any) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images]).transpose(0, 3, 1, 2) / 255


def test_what_cannot_replace_the_autoencoder_is_refused_in_one_line(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(tiny_folder("sd"))
    unet = saved(UNet2DConditionModel.from_pretrained(tiny_folder("sd") / "unet"), tmp_path / "unet")
    coarse: dict[str, Any] = {f"{half}_block_out_channels": (16, 16, 16) for half in ("encoder", "decoder")}
    coarse |= {f"num_{half}_blocks": (1, 1, 1) for half in ("encoder", "decoder")}
    cases = [
        (checkpoint, tmp_path / "nowhere", ("nowhere", "config.json")),
        (checkpoint, unet, ("UNet2DConditionModel", "AutoencoderTiny")),
        (checkpoint, saved(tiny_vae(16), tmp_path / "wide"), ("4 latent channels", "16")),
        (checkpoint, saved(tiny_vae(**coarse), tmp_path / "coarse"), ("4 pixels", "2")),
        (load_checkpoint("calib_data/teacher"), tmp_path / "wide", ("no autoencoder",)),
    ]
    for one, folder, words in cases:
        with pytest.raises(InvalidInputError) as caught:
            with_decoder(one, folder)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message
