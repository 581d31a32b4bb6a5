"""compress/sources/single_file.py: markers, metadata and tensors that diffusers does not read."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, EulerDiscreteScheduler, PNDMScheduler
from safetensors.torch import load_file, save_file

from diffpress.compress.models.components import load_component
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


TEXT = "cond_stage_model.transformer.text_model."
LAYER = "encoder.layers.1.mlp.fc1.weight"


def without(name: str) -> Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]:
    def remove(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        assert name in state
        return {key: tensor for key, tensor in state.items() if key != name}

    return remove


@pytest.mark.parametrize(
    ("name", "named"),
    [
        (TEXT + LAYER, f"tensor '{LAYER}' of text_encoder is missing"),
        (TEXT + "final_layer_norm.bias", "tensor 'final_layer_norm.bias' of text_encoder is missing"),
        ("first_stage_model.decoder.norm_out.weight", "tensor 'decoder.conv_norm_out.weight' of vae is missing"),
        ("model.diffusion_model.out.2.bias", "tensor 'conv_out.bias' of unet is missing"),
        ("first_stage_model.quant_conv.bias", "tensor 'quant_conv.bias' of vae is missing"),
    ],
)
def test_a_missing_tensor_of_a_component_is_named(
    name: str, named: str, converted: Callable[..., Path], tmp_path: Path
) -> None:
    refused(lambda: converted(without(name)), "finetune.safetensors", named)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", [TEXT + LAYER, TEXT + "embeddings.token_embedding.weight", "first_stage_model.decoder.conv_out.bias"]
)
def test_a_misshapen_tensor_of_a_component_is_named(name: str, converted: Callable[..., Path]) -> None:
    def cut(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {**state, name: state[name][:-1].clone()}

    refused(lambda: converted(cut), "finetune.safetensors", name.removeprefix(TEXT).split(".", 2)[-1], "shape")


@pytest.mark.parametrize("name", [TEXT + "encoder.layers.1.adapter.weight", TEXT + "encoder.layers.2.mlp.fc1.weight"])
def test_a_tensor_that_the_text_encoder_does_not_have_is_refused(name: str, converted: Callable[..., Path]) -> None:
    refused(lambda: converted(**{name: torch.ones(3)}), "finetune.safetensors", f"'{name}'", "does not belong")


def test_tensors_of_a_complete_clip_are_ignored(
    converted: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    prefix = "cond_stage_model.transformer."
    names = ("logit_scale", "text_projection.weight", "vision_model.conv1.weight", "text_model.embeddings.position_ids")
    with caplog.at_level("WARNING", logger="diffpress"):
        converted(**{prefix + name: torch.ones(3) for name in names})
    assert caplog.messages == []


def test_a_text_encoder_that_the_pipeline_does_not_have_is_named_in_a_warning(
    converted: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    name = "text_encoders.t5xxl.transformer.encoder.final_layer_norm.weight"
    with caplog.at_level("WARNING", logger="diffpress"):
        converted(**{name: torch.ones(3)})
    (message,) = caplog.messages
    assert f"'{name}'" in message and "not used" in message


@pytest.mark.parametrize(
    ("component", "name", "prefix", "tensor"),
    [
        ("text_encoder", "text_encoder", TEXT, LAYER),
        ("vae", "vae_decoder", "first_stage_model.", "decoder.conv_in.bias"),
    ],
)
def test_a_component_that_the_file_does_not_hold_is_that_of_the_config_and_checked(
    component: str, name: str, prefix: str, tensor: str, converted: Callable[..., Path], config: Path, tmp_path: Path
) -> None:
    def without_component(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in state.items() if not name.startswith(prefix)}

    found = load_component(load_checkpoint(converted(without_component)), name).module.state_dict()
    expected = load_component(load_checkpoint(config), name).module.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)
    (file,) = (config / component).glob("*.safetensors")
    state = load_file(file)
    gone = next(name for name in state if name.endswith(tensor))
    save_file({name: tensor for name, tensor in state.items() if name != gone}, file, metadata={"format": "pt"})

    def again() -> Path:
        return from_single_file(tmp_path / "finetune.safetensors", tmp_path / "out", str(config))

    checkpoint = load_checkpoint(again())
    refused(lambda: load_component(checkpoint, name), f"'{gone}' is missing")
    file.unlink()
    refused(again, "finetune.safetensors", f"has no {component}", str(config), "--config")


def to_open_clip(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the text encoder's tensors to those of OpenCLIP, as in files of Stable Diffusion 2."""
    names = {
        "embeddings.token_embedding": "token_embedding",
        "embeddings.position_embedding.weight": "positional_embedding",
        "final_layer_norm": "ln_final",
        "encoder.layers": "transformer.resblocks",
        "layer_norm": "ln_",
        "self_attn": "attn",
        "fc1": "c_fc",
        "fc2": "c_proj",
    }
    found = {name: tensor for name, tensor in state.items() if not name.startswith(TEXT)}
    for name in sorted(state.keys() - found.keys()):
        new = name.removeprefix(TEXT)
        for theirs, ours in names.items():
            new = new.replace(theirs, ours)
        if ".q_proj." in name:
            tensor = torch.cat([state[name.replace("q_proj", f"{which}_proj")] for which in "qkv"])
            new = new.replace("q_proj.", "in_proj_")
        elif ".k_proj." in name or ".v_proj." in name:
            continue
        else:
            tensor = state[name]
        found["cond_stage_model.model." + new] = tensor.contiguous()
    return found


def test_a_text_encoder_with_the_names_of_open_clip_is_checked_as_well(
    converted: Callable[..., Path], config: Path
) -> None:
    prefix = "cond_stage_model.model."
    extra = {
        prefix + name: torch.ones(32, 32) for name in ("logit_scale", "text_projection", "attn_mask", "visual.proj")
    }
    found = load_component(load_checkpoint(converted(to_open_clip, **extra)), "text_encoder").module.state_dict()
    expected = DiffusionPipeline.from_pretrained(config, local_files_only=True).text_encoder.state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    gone = prefix + "transformer.resblocks.0.attn.in_proj_weight"
    refused(
        lambda: converted(lambda state: without(gone)(to_open_clip(state))),
        "'encoder.layers.0.self_attn.k_proj.weight' of text_encoder is missing (3 in all",
    )
    foreign = prefix + "transformer.resblocks.0.attn.adapter.weight"
    refused(
        lambda: converted(lambda state: {**to_open_clip(state), foreign: torch.ones(3)}),
        f"'{foreign}'",
        "does not belong",
    )


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


def test_the_licence_in_the_header_becomes_a_file(converted: Callable[..., Path]) -> None:
    folder = converted(metadata={"modelspec.license": "CreativeML Open RAIL++-M"})
    assert "CreativeML Open RAIL++-M" in (folder / "LICENSE.txt").read_text()
