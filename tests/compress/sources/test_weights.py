"""compress/sources/weights.py: finding weight files, and streaming them into a module with every tensor checked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from safetensors.torch import load_file, save_file
from torch import nn

from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.sources.weights import (
    load_weights_,
    refuse_quantized,
    tensor_shapes,
    unread_tensors,
    weight_files,
)
from diffpress.runtime.errors import InvalidInputError
from tests.pipelines import vae

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def stored(tmp_path: Path) -> Callable[..., Path]:
    """Save tensors to a safetensors file."""

    def save(**tensors: torch.Tensor) -> Path:
        save_file(tensors, tmp_path / WEIGHTS)
        return tmp_path / WEIGHTS

    return save


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
    (tmp_path / "1.safetensors").touch()
    refused(lambda: weight_files(tmp_path), str(tmp_path / "2.safetensors"), "missing")
    (tmp_path / "2.safetensors").touch()
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


# --- what others store -----------------------------------------------------------------------------------------


DEPRECATED = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def with_deprecated_names(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename attention layers to the names of diffusers < 0.18."""
    renamed = {}
    for name, tensor in state.items():
        for new, old in DEPRECATED.items():
            name = name.replace(f".{new}.", f".{old}.")
        renamed[name] = tensor
    return renamed


def unet_2d() -> Any:
    blocks = {"down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    return UNet2DModel(
        block_out_channels=(16, 32), norm_num_groups=8, attention_head_dim=8, layers_per_block=1, **blocks
    )


@pytest.mark.parametrize("build", [unet_2d, vae])
def test_tensors_under_deprecated_names_are_loaded_as_from_pretrained_does(
    build: Callable[[], Any], tmp_path: Path
) -> None:
    one, other = build(), build()
    state = with_deprecated_names(one.state_dict())
    assert any(".proj_attn." in name for name in state)
    one.save_pretrained(tmp_path)
    save_file(state, tmp_path / WEIGHTS)
    load_weights_(other, weight_files(tmp_path))
    theirs = type(one).from_pretrained(tmp_path)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    "dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.float16, torch.bfloat16, torch.float64]
)
def test_every_floating_point_type_is_converted(dtype: torch.dtype, stored: Callable[..., Path]) -> None:
    values = torch.randn(3, 3).to(dtype)
    model = nn.Linear(3, 3)
    load_weights_(model, [stored(weight=values, bias=torch.zeros(3))])
    assert model.weight.dtype == torch.float32 and torch.equal(model.weight, values.float())


def test_nan_in_float8_is_refused(stored: Callable[..., Path]) -> None:
    weight = torch.full((3, 3), float("nan")).to(torch.float8_e4m3fn)
    refused(lambda: load_weights_(nn.Linear(3, 3), [stored(weight=weight, bias=torch.zeros(3))]), "'weight'", "NaN")


@pytest.mark.parametrize(
    "name",
    ["SCB", "weight.absmax", "weight.quant_state.bitsandbytes__nf4", "qweight", "weight_scale", "weight._data",
     "scale_weight", "scaled_fp8"],
)  # fmt: skip
def test_weights_that_are_already_quantized_are_refused_as_such(name: str, stored: Callable[..., Path]) -> None:
    file = stored(**{"weight": torch.zeros(3, 3), "bias": torch.zeros(3), name: torch.ones(3)})
    refused(lambda: load_weights_(nn.Linear(3, 3), [file]), str(file), f"'{name}'", "already quantized")
    refused(lambda: refuse_quantized(file), str(file), f"'{name}'", "already quantized")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8])
def test_integer_weights_are_refused(dtype: torch.dtype, stored: Callable[..., Path]) -> None:
    file = stored(weight=torch.zeros(3, 3, dtype=dtype), bias=torch.zeros(3))
    refused(lambda: load_weights_(nn.Linear(3, 3), [file]), "'weight'", "already quantized")
    refused(lambda: refuse_quantized(file), "'weight'", "already quantized")


def test_optional_tensors_may_be_missing_but_not_wrong(stored: Callable[..., Path]) -> None:
    model: Any = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    before = model[0].weight.clone()
    file = stored(**{"1.weight": torch.ones(2, 2)})
    refused(lambda: load_weights_(model, [file]), "'0.bias' is missing")
    load_weights_(model, [file], optional=("0.",))
    assert torch.equal(model[0].weight, before) and torch.equal(model[1].weight, torch.ones(2, 2))
    refused(lambda: load_weights_(model, [stored(**{"0.weight": torch.ones(3, 2)})], optional=("0.",)), "'0.weight'")


def test_unread_tensors_are_those_that_nothing_is_computed_from() -> None:
    tensors = {name: torch.empty(4, 2, device="meta") for name in ("renamed", "split", "scaled", "dropped")}

    def convert(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
        state["scaled"] *= 3
        return [state["renamed"], state["split"].chunk(2)[1], state["scaled"].half()]

    assert unread_tensors(tensors, convert) == ["dropped"]
    assert unread_tensors(tensors, lambda _: []) == list(tensors)


def test_the_header_alone_gives_the_shapes(stored: Callable[..., Path]) -> None:
    file = stored(weight=torch.zeros(3, 2), bias=torch.zeros(3).half())
    assert tensor_shapes(file) == {"weight": [3, 2], "bias": [3]}
    file.write_bytes(b"nothing")
    refused(lambda: tensor_shapes(file), str(file), "truncated")


@pytest.mark.parametrize("where", ["..", "../..", "/tmp", "."])
def test_shards_are_read_only_from_the_folder_of_their_index(tmp_path: Path, where: str) -> None:
    folder = tmp_path / "unet"
    folder.mkdir()
    save_file({"a": torch.zeros(2)}, tmp_path / "outside.safetensors")
    save_file({"a": torch.zeros(2)}, folder / "outside.safetensors")
    index = {"weight_map": {"a": f"{where}/outside.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    if where == ".":
        assert weight_files(folder) == [folder / "outside.safetensors"]
        return
    with pytest.raises(InvalidInputError, match="which is not beside it"):
        weight_files(folder)
