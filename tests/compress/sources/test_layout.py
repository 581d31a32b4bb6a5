"""compress/sources/layout.py: reading pipeline folders, and streaming weights into a module."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffpress.compress.sources.layout import INDEX, link_components, load_weights_, read_layout, weight_files
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny pipeline, for tests that modify it."""
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / kind)


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """Save tensors to a safetensors file."""

    def save(**tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / WEIGHTS)
        return tmp_path / WEIGHTS

    return save


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def mapped_file(tensor: torch.Tensor) -> str:
    """Return the file that the tensor's memory maps, '' for ordinary memory."""
    address = tensor.data_ptr()
    for line in Path("/proc/self/maps").read_text().splitlines():
        span, _, rest = line.partition(" ")
        low, high = (int(end, 16) for end in span.split("-"))
        if low <= address < high:
            return rest.split(maxsplit=4)[4].strip() if len(rest.split()) > 4 else ""
    return ""


# --- folders ---------------------------------------------------------------------------------------------------


def test_the_layout_of_a_pipeline_lists_denoiser_decoder_and_encoders(tiny_folder: Callable[..., Path]) -> None:
    layout = read_layout(tiny_folder("sdxl"))
    assert (layout.kind, layout.pipeline) == ("UNet2DConditionModel", "StableDiffusionXLPipeline")
    assert layout.denoiser == tiny_folder("sdxl") / "unet" and layout.decoder == "vae"
    assert layout.encoders == [("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")]
    assert set(layout.configs) == {"vae", "text_encoder", "text_encoder_2"}


def test_a_bare_denoiser_folder_has_no_other_components(tiny_folder: Callable[..., Path]) -> None:
    layout = read_layout(tiny_folder("sd") / "unet")
    assert layout.kind == "UNet2DConditionModel" and layout.configs == {} and layout.decoder is None


def test_without_an_index_the_components_are_the_folders_that_exist(
    copied: Callable[[str], Path], tiny_folder: Callable[..., Path]
) -> None:
    folder = copied("sd")
    (folder / INDEX).unlink()
    layout = read_layout(folder)
    assert set(layout.configs) == {"vae", "text_encoder"} and layout.pipeline == ""
    assert load_checkpoint(folder).hash == load_checkpoint(tiny_folder("sd")).hash


@pytest.mark.parametrize(
    ("kind", "named"), [("dit", "DiTTransformer2DModel"), ("pixart-alpha", "PixArtTransformer2DModel")]
)
def test_the_old_class_name_of_a_transformer_is_recognized(
    kind: str, named: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    present = load_checkpoint(folder)
    edit(folder / "transformer" / "config.json", _class_name="Transformer2DModel")
    older = load_checkpoint(folder)
    assert read_layout(folder).kind == older.source.kind == type(older.model).__name__ == named
    assert older.spec == present.spec


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder", "tokenizer", "scheduler"])
def test_a_missing_component_of_the_index_is_named(component: str, copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    shutil.rmtree(folder / component)
    refused(lambda: read_layout(folder), str(folder), f"'{component}'", "missing")


def test_a_safety_checker_is_left_out_with_a_note_whether_or_not_its_folder_exists(
    copied: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    folder = copied("sd")
    before = load_checkpoint(folder)
    checker = {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    edit(folder / INDEX, **checker, feature_extractor=["transformers", "CLIPImageProcessor"])
    (folder / "safety_checker").mkdir()  # but there is no feature_extractor folder
    assert set(read_layout(folder).ignored) == {"safety_checker", "feature_extractor"}
    with caplog.at_level("INFO", logger="diffpress"):
        after = load_checkpoint(folder)
    assert "safety_checker" in caplog.text and "feature_extractor" in caplog.text and "left out" in caplog.text
    assert after.hash == before.hash


def test_only_pipeline_components_are_linked(copied: Callable[[str], Path], tmp_path: Path) -> None:
    folder, target = copied("sd"), tmp_path / "target"
    (folder / "safety_checker").mkdir()
    target.mkdir()
    link_components(folder, target, skip=("unet",))
    assert {entry.name for entry in target.iterdir()} == {
        INDEX,
        "vae",
        "text_encoder",
        "tokenizer",
        "scheduler",
    }
    one, other = (root / "vae" / WEIGHTS for root in (folder, target))
    assert one.stat().st_ino == other.stat().st_ino


# --- weights ---------------------------------------------------------------------------------------------------


def test_a_tensor_stored_in_the_requested_dtype_stays_a_view_of_the_file(stored: Callable[..., Path]) -> None:
    # larger than a page, so that it is memory-mapped
    values = torch.randn(64, 64)
    file = stored(weight=values, bias=torch.zeros(64))
    model = nn.Linear(64, 64, device="meta")
    load_weights_(model, [file])
    assert torch.equal(model.weight, values) and mapped_file(model.weight) == str(file)
    load_weights_(model, [file], torch.bfloat16)
    assert model.weight.dtype == torch.bfloat16 and mapped_file(model.weight) != str(file)
    assert torch.equal(model.weight, values.bfloat16())


def test_integers_keep_their_dtype_and_parameters_their_requires_grad(stored: Callable[..., Path]) -> None:
    file = stored(weight=torch.ones(2, 2).half(), steps=torch.tensor(7))
    model = nn.Module()
    model.weight = nn.Parameter(torch.zeros(2, 2), requires_grad=False)
    model.register_buffer("steps", torch.tensor(0))
    load_weights_(model, [file])
    assert model.weight.dtype == torch.float32 and not model.weight.requires_grad
    assert model.steps.dtype == torch.int64 and model.steps == 7


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_non_finite_value_is_refused_with_its_tensor(value: float, stored: Callable[..., Path]) -> None:
    weight = torch.zeros(3, 3)
    weight[1, 2] = value
    file = stored(weight=weight, bias=torch.zeros(3))
    refused(lambda: load_weights_(nn.Linear(3, 3), [file]), str(file), "'weight'", "NaN or infinite")


def test_mismatched_tensors_are_refused_by_name(stored: Callable[..., Path]) -> None:
    file = stored(weight=torch.zeros(3, 3), bias=torch.zeros(3))
    refused(lambda: load_weights_(nn.Linear(3, 3, bias=False), [file]), "'bias'", "does not belong")
    refused(lambda: load_weights_(nn.Linear(4, 3), [file]), "'weight'", "[3, 3]", "[3, 4]")
    refused(lambda: load_weights_(nn.Bilinear(3, 3, 3), [stored(bias=torch.zeros(3))]), "'weight'", "is missing")


def test_weight_files_are_found_by_name_by_index_or_as_the_only_file(tmp_path: Path) -> None:
    shards = {f"{WEIGHTS}.index.json": json.dumps({"weight_map": {"a": "2.safetensors", "b": "1.safetensors"}})}
    (tmp_path / "a.safetensors").touch()
    assert weight_files(tmp_path) == [tmp_path / "a.safetensors"]
    (tmp_path / "a.fp16.safetensors").touch()
    refused(lambda: weight_files(tmp_path), str(tmp_path), "several", "a.fp16.safetensors")
    (tmp_path / WEIGHTS).touch()
    assert weight_files(tmp_path) == [tmp_path / WEIGHTS]
    for name, text in shards.items():
        (tmp_path / name).write_text(text)
    assert weight_files(tmp_path) == [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    (tmp_path / f"{WEIGHTS}.index.json").write_text("{}")
    refused(lambda: weight_files(tmp_path), "weight_map")


def test_a_pickle_is_never_read(tmp_path: Path) -> None:
    (tmp_path / "diffusion_pytorch_model.bin").touch()
    refused(lambda: weight_files(tmp_path), str(tmp_path), "pickle", "safetensors")


def test_a_truncated_file_is_refused(stored: Callable[..., Path]) -> None:
    file = stored(weight=torch.zeros(3, 3), bias=torch.zeros(3))
    file.write_bytes(file.read_bytes()[:-4])
    refused(lambda: load_weights_(nn.Linear(3, 3), [file]), str(file), "truncated")


def test_a_denoiser_is_loaded_as_views_of_its_file(tiny_folder: Callable[..., Path]) -> None:
    file = tiny_folder("sd") / "unet" / WEIGHTS
    model = load_checkpoint(tiny_folder("sd")).model
    large = [name for name, value in load_file(file).items() if value.numel() > 1024]
    assert large and all(mapped_file(model.state_dict()[name]) == str(file) for name in large)
