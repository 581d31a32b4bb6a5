"""runtime/lora/read.py: every tensor of a LoRA is used, or its file is refused in one line that names it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.lora.read import lora_facts, parsed_loras, read_loras

LAYER, CONV, TEXT = "mid_block.attentions.0.proj_in", "mid_block.resnets.0.conv1", "encoder.layers.0.fc1"
KOHYA = "lora_unet_mid_block_attentions_0_proj_in"
DTYPES = {"float32": "F32", "float16": "F16", "int64": "I64"}

Tensors = Mapping[str, np.ndarray]


@pytest.fixture
def bundle(tiny: Path) -> Bundle:
    """Return a bundle whose manifest has 2 slots of rank 4, beside a layer of the denoiser and one of the encoder."""
    opened = load_bundle(tiny)
    slots = {"file": "denoiser.lora.onnx", "slots": 2, "rank": 4, "bytes": 0, "component": "unet"}
    of_denoiser = {**slots, "layers": {LAYER: {"shape": [6, 8]}}, "without": [CONV]}
    of_text = {**slots, "layers": {TEXT: {"shape": [3, 5]}}, "without": []}
    graphs = {
        "denoiser": {**opened.manifest["graphs"]["denoiser"], "lora": of_denoiser},
        "text_encoder": {"file": "text_encoder.onnx", "lora": of_text},
    }
    return replace(opened, manifest={**opened.manifest, "graphs": graphs})


def write(path: Path, tensors: Tensors, metadata: Mapping[str, str] | None = None) -> Path:
    """Write a safetensors file."""
    header: dict[str, Any] = {} if metadata is None else {"__metadata__": dict(metadata)}
    data = b""
    for name, array in tensors.items():
        ends = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": DTYPES[array.dtype.name], "shape": list(array.shape), "data_offsets": ends}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def pair(
    name: str = KOHYA, out: int = 6, width: int = 8, rank: int = 2, kind: str = "float32"
) -> dict[str, np.ndarray]:
    noise = np.random.default_rng(0)
    shapes = {f"{name}.lora_down.weight": (rank, width), f"{name}.lora_up.weight": (out, rank)}
    return {key: noise.standard_normal(shape).astype(kind) for key, shape in shapes.items()}


def test_scale_and_alpha_are_in_the_factors(bundle: Bundle, tmp_path: Path) -> None:
    given = pair(kind="float16") | {f"{KOHYA}.alpha": np.array(6.0, np.float32)}
    ((found,),) = read_loras(bundle, {write(tmp_path / "a.safetensors", given): 0.5}).values()
    down, up = (given[f"{KOHYA}.lora_{side}.weight"].astype(np.float32) for side in ("down", "up"))
    np.testing.assert_allclose(found[LAYER].up @ found[LAYER].down, 0.5 * 6.0 / 2 * up @ down, rtol=1e-5)
    assert found[LAYER].up.dtype == found[LAYER].down.dtype == np.float32


def test_loras_are_listed_by_the_graph_that_they_change(bundle: Bundle, tmp_path: Path) -> None:
    text = pair(f"text_encoder.text_model.{TEXT}", 3, 5)
    names = {"a": pair(), "b": text, "c": {**pair(), **text}}
    files = {name: write(tmp_path / f"{name}.safetensors", tensors) for name, tensors in names.items()}
    found = read_loras(bundle, {files["a"]: 1, files["c"]: 2.0})
    assert {graph: len(loras) for graph, loras in found.items()} == {"denoiser": 2, "text_encoder": 1}
    assert list(read_loras(bundle, {files["b"]: 1.0})) == ["text_encoder"]
    assert read_loras(bundle, {}) == {}


def test_a_folder_of_diffusers_or_peft_is_a_lora(bundle: Bundle, tmp_path: Path) -> None:
    file = write(tmp_path / "adapter_model.safetensors", pair())
    assert read_loras(bundle, {tmp_path: 1.0}).keys() == read_loras(bundle, {file: 1.0}).keys()
    write(tmp_path / "pytorch_lora_weights.safetensors", pair())
    with pytest.raises(InvalidInputError, match="name the LoRA's file"):
        read_loras(bundle, {tmp_path: 1.0})


NAN = np.full((2, 8), np.nan, np.float32)
REFUSED: dict[str, tuple[Tensors, str]] = {
    "no tensors": ({}, "contains no tensors"),
    "a layer of another model": (pair() | pair("lora_unet_other"), "'lora_unet_other.lora_down.weight' fits no layer"),
    "a text encoder that is not there": (pair("lora_te2_text_model_encoder_layers_0_fc1"), "fits no layer"),
    "no part of a LoRA": (pair() | {f"{KOHYA}.dora_scale": NAN}, f"'{KOHYA}.dora_scale' is not part of a LoRA"),
    "a layer without slot": (pair(f"unet.{CONV}"), f"'{CONV}', which has no slot .* --lora-layers all"),
    "widths of another model": (pair(width=9), r"\[2, 9\] .* do not fit the layer's weight \[6, 8\]"),
    "a rank above the slot's": (pair(rank=5), "has rank 5, the slots have 4; .* --lora-rank 5"),
    "rank 0": (pair(rank=0), "rank 0"),
    "ranks that differ": (pair() | {f"{KOHYA}.lora_up.weight": np.ones((6, 3), np.float32)}, "do not fit"),
    "NaN": (pair() | {f"{KOHYA}.lora_down.weight": NAN}, "lora_down.weight' contains NaN"),
    "infinity": (pair() | {f"{KOHYA}.lora_up.weight": np.full((6, 2), np.inf, np.float32)}, "lora_up.weight' contains"),
    "integers": (pair(kind="int64"), "no float factors"),
    "a missing factor": ({f"{KOHYA}.lora_down.weight": pair()[f"{KOHYA}.lora_down.weight"]}, "the 'up' factor"),
    "an alpha alone": ({f"{KOHYA}.alpha": np.ones((), np.float32)}, "the 'down' factor"),
    "an alpha of two numbers": (pair() | {f"{KOHYA}.alpha": np.ones(2, np.float32)}, "not one finite number"),
    "one layer twice": (pair() | pair(f"unet.{LAYER}"), "are of the same layer"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_file_that_does_not_fit_is_refused_in_one_line(name: str, bundle: Bundle, tmp_path: Path) -> None:
    tensors, words = REFUSED[name]
    path = write(tmp_path / "a.safetensors", tensors)
    with pytest.raises(InvalidInputError, match=words) as caught:
        read_loras(bundle, {path: 1.0})
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), True, "1", None])
def test_a_scale_that_is_no_finite_number_is_refused(scale: Any, bundle: Bundle, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="is not a finite number"):
        read_loras(bundle, {write(tmp_path / "a.safetensors", pair()): scale})


def test_too_many_loras_and_a_bundle_without_slots_name_the_flag(bundle: Bundle, tiny: Path, tmp_path: Path) -> None:
    files: dict[str | Path, float] = {write(tmp_path / f"{n}.safetensors", pair()): 1.0 for n in range(3)}
    with pytest.raises(InvalidInputError, match=r"3 LoRAs are more than the 2 slots .* --lora-slots 3"):
        read_loras(bundle, files)
    with pytest.raises(InvalidInputError, match=r"no slots for LoRAs; .* --lora-slots"):
        read_loras(load_bundle(tiny), files)


def test_files_that_are_not_there_or_pickles_are_refused(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    for name, words in (("none.safetensors", "no such file"), ("a.bin", "pickles")):
        with pytest.raises(InvalidInputError, match=words):
            read_loras(bundle, {tmp_path / name: 1.0})


def test_arguments_are_paths_with_a_scale(tmp_path: Path) -> None:
    (tmp_path / "a:2").write_bytes(b"")
    words = ["b.safetensors:0.5", "c.safetensors", f"{tmp_path}/a:2"]
    assert parsed_loras(words) == {Path("b.safetensors"): 0.5, Path("c.safetensors"): 1.0, tmp_path / "a:2": 1.0}
    with pytest.raises(InvalidInputError, match="named twice"):
        parsed_loras(["b.safetensors:0.5", "b.safetensors"])


def test_a_record_names_files_by_their_content(tmp_path: Path) -> None:
    first, second = (write(tmp_path / f"{n}.safetensors", pair(rank=n)) for n in (1, 2))
    assert lora_facts({}) is None
    assert str(lora_facts({first: 0.5})).startswith("1.safetensors:0.5 sha256 ")
    assert lora_facts({first: 0.5}) != lora_facts({second: 0.5}) != lora_facts({second: 1.0})
