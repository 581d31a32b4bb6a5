"""compress/sources/single_file.py: markers, metadata and tensors that diffusers does not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import save_file

from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.sources.single_file import from_single_file
from diffpress.runtime.errors import InvalidInputError
from tests.against_diffusers import psnr_db, sampled_by_diffusers, sampled_in_torch, with_short_plan
from tests.compress.sources.test_pipelines import original_layout
from tests.pipelines import SD_BETAS

MARKER = torch.zeros(0)


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


@pytest.fixture
def config(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    """A Stable Diffusion with the scheduler of SDXL, as the source of configs."""
    pipe: Any = DiffusionPipeline.from_pretrained(tiny_folder("sd"), local_files_only=True)
    pipe.scheduler = EulerDiscreteScheduler(**SD_BETAS, timestep_spacing="leading", steps_offset=1)
    pipe.save_pretrained(tmp_path / "config")
    return tmp_path / "config"


@pytest.fixture
def converted(config: Path, tmp_path: Path) -> Callable[..., Path]:
    """Save the pipeline as a single file with further tensors, and convert it."""

    def convert(
        change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = lambda state: state,
        metadata: dict[str, str] | None = None,
        **added: torch.Tensor,
    ) -> Path:
        pipe = DiffusionPipeline.from_pretrained(config, local_files_only=True)
        file = tmp_path / "finetune.safetensors"
        save_file(change({**original_layout(pipe), **added}), file, metadata=metadata)
        return from_single_file(file, tmp_path / "out", str(config))

    return convert


def scheduler_of(folder: Path) -> dict[str, Any]:
    entries: dict[str, Any] = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    return entries


# --- markers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_snr", [True, False])
def test_markers_of_v_prediction_are_followed(zero_snr: bool, converted: Callable[..., Path], config: Path) -> None:
    folder = converted(v_pred=MARKER, **({"ztsnr": MARKER.clone()} if zero_snr else {}))
    entries = {**scheduler_of(config), "prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    assert scheduler_of(folder) == entries
    checkpoint = with_short_plan(load_checkpoint(folder), steps=3)
    assert checkpoint.spec.prediction == "v"
    # diffusers, set up by hand as the model cards of such files say
    pipe: Any = DiffusionPipeline.from_pretrained(config, local_files_only=True)
    settings = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": zero_snr}
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, **settings)
    assert psnr_db(sampled_in_torch(checkpoint), sampled_by_diffusers(folder, checkpoint, pipe=pipe)) >= 90


def test_without_markers_the_scheduler_is_that_of_the_config(converted: Callable[..., Path], config: Path) -> None:
    assert scheduler_of(converted()) == scheduler_of(config)


@pytest.mark.parametrize(
    ("markers", "named"),
    [
        (("ztsnr",), "ztsnr"),
        (("edm_mean", "edm_std"), "edm_mean"),
        (("v_pred", "edm_vpred.sigma_max"), "edm_vpred.sigma_max"),
    ],
)
def test_markers_that_are_not_followed_are_refused_by_name(
    markers: tuple[str, ...], named: str, converted: Callable[..., Path]
) -> None:
    refused(lambda: converted(**{name: torch.ones(4) for name in markers}), "finetune.safetensors", f"'{named}'")


def test_a_marker_that_the_scheduler_cannot_follow_is_refused(converted: Callable[..., Path], config: Path) -> None:
    scheduler: Any = PNDMScheduler(**SD_BETAS, skip_prk_steps=True, steps_offset=1)
    scheduler.save_pretrained(config / "scheduler")
    index = json.loads((config / "model_index.json").read_text())
    (config / "model_index.json").write_text(json.dumps({**index, "scheduler": ["diffusers", "PNDMScheduler"]}))
    refused(
        lambda: converted(v_pred=MARKER, ztsnr=MARKER.clone()), "rescale_betas_zero_snr", "PNDMScheduler", "--config"
    )


def test_metadata_that_contradict_the_scheduler_are_refused(converted: Callable[..., Path]) -> None:
    entry = "modelspec.prediction_type"
    refused(lambda: converted(metadata={entry: "v"}), entry, "'v'", "'epsilon'", "--config")
    converted(metadata={entry: "epsilon"})


# --- tensors ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.diffusion_model.input_blocks.9.0.adapter.weight",
        "model.diffusion_model.extra.weight",
        "first_stage_model.decoder.extra.weight",
    ],
)
def test_a_tensor_of_the_network_that_diffusers_does_not_read_is_refused(
    name: str, converted: Callable[..., Path]
) -> None:
    refused(lambda: converted(**{name: torch.ones(3)}), "finetune.safetensors", f"'{name}'", "does not belong")


def test_tensors_of_training_are_ignored_and_unknown_ones_named(
    converted: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    training = ("betas", "alphas_cumprod", "model_ema.decay", "first_stage_model.loss.logvar", "sqrt_alphas_cumprod")
    with caplog.at_level("WARNING", logger="diffpress"):
        converted(**{name: torch.ones(3) for name in training})
        assert caplog.messages == []
        converted(**{"something.else": torch.ones(3)})
    (message,) = caplog.messages
    assert "'something.else'" in message and "finetune.safetensors" in message


def test_a_file_in_float8_is_converted(converted: Callable[..., Path]) -> None:
    def to_float8(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor.to(torch.float8_e4m3fn) for name, tensor in state.items()}

    model = load_checkpoint(converted(to_float8)).model
    weight = model.state_dict()["conv_in.weight"]
    assert weight.dtype == torch.float32 and torch.equal(weight, weight.to(torch.float8_e4m3fn).float())


@pytest.mark.parametrize(
    "name", ["scaled_fp8", "model.diffusion_model.out.2.scale_weight", "model.diffusion_model.out.2.weight.absmax"]
)
def test_a_quantized_file_is_refused(name: str, converted: Callable[..., Path]) -> None:
    refused(lambda: converted(**{name: torch.ones(1)}), "finetune.safetensors", f"'{name}'", "already quantized")


def test_nan_in_a_single_file_is_refused_with_its_component(converted: Callable[..., Path]) -> None:
    def broken(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state, "model.diffusion_model.out.2.bias": torch.full((4,), float("nan"))}

    folder = converted(broken)
    refused(lambda: load_checkpoint(folder), "'conv_out.bias'", "NaN")


def test_nothing_is_printed(
    converted: Callable[..., Path], config: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    converted()
    capfd.readouterr()
    from_single_file(tmp_path / "finetune.safetensors", tmp_path / "again", str(config))
    assert capfd.readouterr() == ("", "")
