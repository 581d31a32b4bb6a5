"""compress/sources/pipeline_settings.py: the pipeline's class has the last word on every config, as in diffusers."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline

from diffpress.compress.sources.diffusers_folder import spec_of_folder
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.against_diffusers import psnr_db
from tests.compress.sources.config_fuzz import (
    FUZZED,
    INDEX,
    apply_,
    class_defaults,
    config_file,
    sampled_as_published,
    sampled_by_diffpress,
)
from tests.pipelines import tiny_pipeline, unet


@pytest.fixture(scope="module")
def fuzzed_folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folder of a tiny pipeline of the fuzz, created once per kind; do not modify."""
    made: dict[str, Path] = {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = tiny_pipeline(FUZZED[kind], tmp_path_factory.mktemp(kind) / kind)
        return made[kind]

    return folder


@pytest.fixture
def copied(fuzzed_folder: Callable[[str], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny pipeline, for a test to change."""
    return lambda kind: shutil.copytree(fuzzed_folder(kind), tmp_path / "changed")


def edit(file: Path, **entries: Any) -> None:
    """Set entries of a JSON file; those set to `...` are removed."""
    config = {**json.loads(file.read_text()), **entries}
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def refused(folder: Path, *words: str) -> None:
    """Assert that loading the folder, and reading its spec, raise one line that contains each of `words`."""
    for read in (load_checkpoint, spec_of_folder):
        with pytest.raises(InvalidInputError) as caught:
            read(folder)
        message = str(caught.value)
        assert "\n" not in message and all(word in message for word in words), message


# --- defaults of the classes -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(FUZZED))
def test_entries_that_equal_the_default_of_the_class_have_no_effect(kind: str, copied: Callable[[str], Path]) -> None:
    folder = copied(kind)
    before, image = load_checkpoint(folder), sampled_by_diffpress(folder)
    dropped = 0
    for component in (*(path.name for path in folder.iterdir() if path.is_dir()), INDEX):
        if component.startswith("tokenizer"):
            continue
        file, defaults = config_file(folder, component), class_defaults(folder, component)
        config = json.loads(file.read_text())
        same = {key: ... for key, value in config.items() if key in defaults and plain(defaults[key]) == value}
        edit(file, **same)
        dropped += len(same)
    assert dropped > 10
    after = load_checkpoint(folder)
    assert spec_of_folder(folder) == after.spec
    # `Other.from_config(scheduler.config)` takes its own defaults for entries that the file does not have
    assert replace(after.spec, solver_settings=()) == replace(before.spec, solver_settings=())
    ours, theirs = after.model.state_dict(), before.model.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert np.array_equal(sampled_by_diffpress(folder), image)


def plain(value: Any) -> Any:
    """Return a default as JSON holds it."""
    return json.loads(json.dumps(value, default=str))


# --- corrections by the pipelines' constructors ----------------------------------------------------------------

SCHEDULER, UNET, VAE = "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json"
OLD_FILES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "a vae of 2022": ("sd", VAE, {"scaling_factor": ...}),
    "a vq model of 2022": ("ldm", "vqvae/config.json", {"scaling_factor": ...}),
    "a vae with a shift that the pipeline does not apply": ("sd", VAE, {"shift_factor": 0.1}),
    "a vae with statistics that the pipeline does not apply": ("sd", VAE, {"latents_mean": [1.0] * 4}),
    "a vae whose statistics the pipeline applies": ("sdxl", VAE, {"latents_mean": [0.2] * 4, "latents_std": [2.0] * 4}),
    "a scheduler that clips latents": ("sd", SCHEDULER, {"clip_sample": True}),
    "a scheduler without clip_sample": ("sd", SCHEDULER, {"clip_sample": ...}),
    "a scheduler with another offset": ("sd", SCHEDULER, {"steps_offset": 0}),
    "a scheduler without an offset": ("sd", SCHEDULER, {"steps_offset": ...}),
    "a small unet of 2022": ("sd", UNET, {"sample_size": 8, "_diffusers_version": "0.6.0"}),
    "a pipeline that lets its scheduler clip latents": ("ldm-kl", SCHEDULER, {"clip_sample": True}),
    "a transformer whose scheduler clips latents": ("dit", SCHEDULER, {"clip_sample": True}),
    "a pipeline that keeps clip_sample": (
        "sdxl",
        SCHEDULER,
        {"_class_name": "DDPMScheduler", "clip_sample": True, "steps_offset": 0},
    ),
    "a scheduler of another class than in its index": ("sd", SCHEDULER, {"_class_name": "EulerDiscreteScheduler"}),
    "a scheduler whose samples grow with sigma": (
        "ldm",
        SCHEDULER,
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "trailing"},
    ),
    "another scheduler in a DDIM pipeline": ("ddim", SCHEDULER, {"_class_name": "PNDMScheduler"}),
    "two clip tokenizers of which the first decides": (
        "sd3",
        "tokenizer_2/tokenizer_config.json",
        {"model_max_length": 12},
    ),
    "text states that the unet projects": ("sd", UNET, {"encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj"}),
    "text states added to the time": (
        "sd",
        UNET,
        {"addition_embed_type": "text", "addition_embed_type_num_heads": 4},
    ),
    "a guidance input in a usual pipeline": ("sd", UNET, {"time_cond_proj_dim": 32}),
    "a text encoder that returns tuples": ("sd", "text_encoder/config.json", {"return_dict": False}),
    "a vae of one level": (
        "sd",
        VAE,
        {
            "block_out_channels": [16],
            "down_block_types": ["DownEncoderBlock2D"],
            "up_block_types": ["UpDecoderBlock2D"],
        },
    ),
    "more classes than ImageNet": ("dit", "transformer/config.json", {"num_embeds_ada_norm": 1010}),
    "a transformer without learned variance": ("dit", "transformer/config.json", {"out_channels": 4}),
}


@pytest.mark.parametrize("case", OLD_FILES)
def test_a_folder_is_sampled_as_its_pipeline_samples_it(case: str, copied: Callable[[str], Path]) -> None:
    kind, file, entries = OLD_FILES[case]
    folder = copied(kind)
    apply_(folder, Path(file).parent.name, {entry: value for entry, value in entries.items() if value is not ...})
    edit(folder / file, **{entry: value for entry, value in entries.items() if value is ...})
    if "index" in case:
        edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    if "_diffusers_version" in entries:  # the constructor sets the size to 64
        assert load_checkpoint(folder).spec.sample_shape == (4, 64, 64)
        return
    assert psnr_db(sampled_by_diffpress(folder), sampled_as_published(folder)) >= 90


def test_a_tiny_autoencoder_decodes_as_in_diffusers(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    shutil.rmtree(folder / "vae")
    torch.manual_seed(0)
    blocks = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    vae: Any = AutoencoderTiny(**blocks, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))
    vae.save_pretrained(folder / "vae")
    edit(folder / "model_index.json", vae=["diffusers", "AutoencoderTiny"])
    assert psnr_db(sampled_by_diffpress(folder), sampled_as_published(folder)) >= 90


def test_a_folder_without_an_index_is_corrected_by_its_usual_pipeline(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / SCHEDULER, clip_sample=True, steps_offset=0)
    theirs = sampled_as_published(folder)
    (folder / "model_index.json").unlink()
    assert psnr_db(sampled_by_diffpress(folder), theirs) >= 90


@pytest.mark.parametrize("name", ["vae", "vqvae"])
def test_a_decoder_of_either_name_is_used_without_an_index(name: str, copied: Callable[[str], Path]) -> None:
    folder = copied("ldm-kl")
    theirs = sampled_as_published(folder)
    (folder / "model_index.json").unlink()
    (folder / "vqvae").rename(folder / name)
    assert psnr_db(sampled_by_diffpress(folder), theirs) >= 90


def test_a_component_beside_a_network_that_does_not_use_it_is_refused(
    fuzzed_folder: Callable[[str], Path], copied: Callable[[str], Path]
) -> None:
    folder = copied("ldm")
    (folder / "model_index.json").unlink()
    for name in ("text_encoder", "tokenizer"):
        shutil.copytree(fuzzed_folder("sd") / name, folder / name)
    refused(folder, "'text_encoder'", "LDMPipeline")


def test_reading_settings_prints_nothing_but_does_not_change_the_files(
    copied: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied("sd")
    edit(folder / SCHEDULER, clip_sample=True, steps_offset=0)
    before = {file: file.read_bytes() for file in folder.rglob("*.json")}
    load_checkpoint(folder)
    assert {file: file.read_bytes() for file in folder.rglob("*.json")} == before
    assert capsys.readouterr() == ("", "")


# --- refused pipelines, components and entries -----------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "StableDiffusionPAGPipeline",
        "StableDiffusionControlNetPipeline",
        "StableDiffusionImg2ImgPipeline",
        "StableDiffusionInstructPix2PixPipeline",
        "StableDiffusionUpscalePipeline",
        "AnimateDiffPipeline",
        "MyOwnPipeline",
        ["pipeline_own", "MyOwnPipeline"],
    ],
)
def test_a_pipeline_that_samples_in_another_way_is_refused(name: Any, copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / "model_index.json", _class_name=name)
    refused(folder, "model_index.json", name if isinstance(name, str) else name[1], "StableDiffusionPipeline", "unet/")
    assert load_checkpoint(folder / "unet").spec.conditioning.kind == "text"


@pytest.mark.parametrize("component", ["controlnet", "unet_2", "adapter", "text_encoder_2", "image_normalizer"])
def test_a_component_that_the_pipeline_does_not_have_is_refused(
    component: str, copied: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = copied("sd")
    shutil.copytree(folder / "text_encoder", folder / component)
    edit(folder / "model_index.json", **{component: ["diffusers", "ControlNetModel"]})
    refused(folder, "model_index.json", f"'{component}'", "StableDiffusionPipeline")


def test_components_that_do_not_change_the_image_are_accepted(copied: Callable[[str], Path]) -> None:
    folder = copied("sdxl")
    before = load_checkpoint(folder).spec
    edit(
        folder / "model_index.json",
        feature_extractor=["transformers", "CLIPImageProcessor"],
        image_encoder=["transformers", "CLIPVisionModelWithProjection"],
        controlnet=[None, None],
        add_watermarker=None,
    )
    assert load_checkpoint(folder).spec == before


@pytest.mark.parametrize(
    ("kind", "entry", "value"),
    [
        ("sdxl", "requires_aesthetics_score", True),
        ("sdxl", "add_watermarker", True),
        ("sdxl", "force_zeros_for_empty_prompt", "no"),
        ("sd", "boundary_ratio", 0.9),
    ],
)
def test_an_unknown_entry_of_the_index_is_refused(
    kind: str, entry: str, value: Any, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    edit(folder / "model_index.json", **{entry: value})
    refused(folder, "model_index.json", entry)


UNET_ENTRIES: list[tuple[str, dict[str, Any]]] = [
    ("sd", {"num_class_embeds": 10}),
    ("sd", {"class_embed_type": "timestep"}),
    ("sd", {"class_embed_type": "projection", "projection_class_embeddings_input_dim": 16}),
    ("sd", {"encoder_hid_dim_type": "image_proj", "encoder_hid_dim": 32}),
    ("sd", {"encoder_hid_dim_type": "ip_image_proj", "encoder_hid_dim": 32}),
    ("sd", {"addition_embed_type": "image", "encoder_hid_dim": 32}),
    ("sd", {"addition_embed_type": "text_image", "encoder_hid_dim": 32}),
    ("sdxl", {"addition_embed_type": None}),
    ("lcm", {"time_cond_proj_dim": None}),
    ("ldm", {"class_embed_type": "identity", "num_class_embeds": 10}),
]


@pytest.mark.parametrize(("kind", "entries"), UNET_ENTRIES)
def test_a_unet_that_needs_another_input_is_refused(
    kind: str, entries: dict[str, Any], copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    edit(folder / UNET, **entries)
    refused(folder, UNET, next(iter(entries)))


@pytest.mark.parametrize(
    ("kind", "channels", "task"),
    [
        ("sd", 9, "inpainting"),
        ("sd", 8, "instruction"),
        ("sd", 7, "upscaling"),
        ("sd", 5, "depth"),
        ("flux", 384, "Fill"),
        ("flux", 128, "control"),
        ("sd3", 33, "another input"),
        ("ldm", 6, "another input"),
        ("pixart-alpha", 9, "another input"),
        ("dit", 9, "another input"),
    ],
)
def test_a_network_with_more_input_than_output_channels_is_refused_with_its_task(
    kind: str, channels: int, task: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    file = next(file for file in (folder / UNET, folder / "transformer/config.json") if file.is_file())
    out = {"out_channels": 64} if kind == "flux" else {}
    edit(file, in_channels=channels, **out)
    refused(folder, file.name, "in_channels", task)


@pytest.mark.parametrize(
    ("kind", "entries"),
    [
        ("sd", {"scaling_factor": None}),
        ("sd", {"scaling_factor": 0}),
        ("sd", {"scaling_factor": "small"}),
        ("sd", {"latent_channels": 16}),
        ("sd", {"_class_name": "AutoencoderDC"}),
        ("sd3", {"shift_factor": None}),
        ("sdxl", {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0] * 4}),
        ("sdxl", {"latents_std": [1.0, 2.0, 3.0, 4.0], "latents_mean": [0.0] * 4}),
    ],
)
def test_an_entry_of_the_decoder_that_cannot_be_followed_is_refused_in_its_own_file(
    kind: str, entries: dict[str, Any], copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    edit(folder / VAE, **entries)
    if "_class_name" in entries:
        edit(folder / "model_index.json", vae=["diffusers", entries["_class_name"]])
    entry = next(iter(entries))
    refused(folder, VAE, "AutoencoderDC" if entry == "_class_name" else entry)


@pytest.mark.parametrize(
    ("kind", "scheduler"),
    [
        ("lcm", "DDIMScheduler"),
        ("sd3", "EulerDiscreteScheduler"),
        ("flux", "HeunDiscreteScheduler"),
        ("dit", "LMSDiscreteScheduler"),
        ("ldm", "EulerDiscreteScheduler"),
    ],
)
def test_a_scheduler_that_the_pipeline_does_not_work_with_is_refused(
    kind: str, scheduler: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    edit(folder / "model_index.json", scheduler=["diffusers", scheduler])
    refused(folder, "model_index.json", scheduler)


@pytest.mark.parametrize(
    ("component", "entry"),
    [
        ("scheduler", ["transformers", "PNDMScheduler"]),
        ("unet", ["transformers", "UNet2DConditionModel"]),
        ("vae", ["transformers", "AutoencoderKL"]),
        ("unet", ["my_unet", "UNet2DConditionModel"]),
    ],
)
def test_a_component_of_another_library_is_refused(
    component: str, entry: list[str], copied: Callable[[str], Path]
) -> None:
    folder = copied("sd")
    edit(folder / "model_index.json", **{component: entry})
    with pytest.raises((ValueError, AttributeError, OSError)):
        DiffusionPipeline.from_pretrained(folder, local_files_only=True)
    refused(folder, ".".join(entry))


def test_a_denoiser_of_another_family_than_its_pipeline_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / "model_index.json", _class_name="FluxPipeline")
    refused(folder, "model_index.json", "FluxPipeline", "UNet2DConditionModel")


@pytest.mark.parametrize("kind", ["sd", "ldm"])
def test_a_unet_without_a_size_is_refused(kind: str, copied: Callable[[str], Path]) -> None:
    folder = copied(kind)
    edit(folder / UNET, sample_size=...)
    refused(folder, UNET, "sample_size")


# --- a denoiser alone ------------------------------------------------------------------------------------------


def test_a_denoiser_without_a_scheduler_warns_what_is_assumed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = unet()
    model.save_pretrained(tmp_path / "unet")
    with caplog.at_level(logging.WARNING):
        checkpoint = load_checkpoint(tmp_path / "unet")
    (warning,) = [record.getMessage() for record in caplog.records if record.name.startswith("diffpress")]
    assert str(tmp_path / "scheduler" / "scheduler_config.json") in warning and "epsilon" in warning
    assert checkpoint.spec.prediction == "epsilon" and not checkpoint.spec.plan.clip


def test_a_denoiser_alone_is_corrected_by_its_usual_pipeline(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / SCHEDULER, clip_sample=True, steps_offset=0)
    assert load_checkpoint(folder / "unet").spec.plan == load_checkpoint(folder).spec.plan
