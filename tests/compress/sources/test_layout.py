"""compress/sources/layout.py: reading pipeline folders: their components, classes and configs."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress.compress.sources.layout import INDEX, link_components, read_layout
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copy a tiny pipeline, for tests that modify it."""
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / kind)


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


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


# --- classes ---------------------------------------------------------------------------------------------------


def test_the_class_of_a_component_is_the_one_in_the_index(copied: Callable[[str], Path]) -> None:
    folder = copied("pixart-alpha")
    edit(folder / "text_encoder" / "config.json", architectures=["T5ForConditionalGeneration"])
    edit(folder / "transformer" / "config.json", _class_name="SomethingElse")
    edit(folder / "vae" / "config.json", _class_name="SomethingElse")
    layout = read_layout(folder)
    assert layout.kind == "PixArtTransformer2DModel"
    assert (layout.kind_of("text_encoder"), layout.kind_of("vae")) == ("T5EncoderModel", "AutoencoderKL")


@pytest.mark.parametrize(
    ("kind", "named", "found"),
    [
        ("sd", ["CLIPTextModel"], "CLIPTextModel"),
        ("sd", ["CLIPModel"], "CLIPTextModel"),
        ("pixart-alpha", ["T5ForConditionalGeneration"], "T5EncoderModel"),
        ("pixart-alpha", ["T5Model"], "T5EncoderModel"),
        ("sd", None, "without a name"),
    ],
)
def test_without_an_index_the_class_is_the_encoder_of_the_one_in_the_config(
    kind: str, named: list[str] | None, found: str, copied: Callable[[str], Path]
) -> None:
    folder = copied(kind)
    (folder / INDEX).unlink()
    edit(folder / "text_encoder" / "config.json", architectures=named)
    assert read_layout(folder).kind_of("text_encoder") == found


def test_a_class_of_the_pipelines_own_code_is_named_with_its_file(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    edit(folder / INDEX, unet=["my_unet", "UNet2DConditionModel"], vae=["my_vae", "AutoencoderKL"])
    layout = read_layout(folder)
    assert (layout.kind, layout.kind_of("vae")) == ("my_unet.UNet2DConditionModel", "my_vae.AutoencoderKL")
    refused(lambda: load_checkpoint(folder), "my_unet.UNet2DConditionModel", "not supported")


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
@pytest.mark.parametrize("method", ["bitsandbytes", "gguf", "torchao"])
def test_a_component_whose_config_says_quantized_is_refused(
    component: str, method: str, copied: Callable[[str], Path]
) -> None:
    folder = copied("sd")
    edit(folder / component / "config.json", quantization_config={"quant_method": method, "load_in_4bit": True})
    refused(lambda: load_checkpoint(folder), str(folder / component / "config.json"), "quantization_config", method)
    edit(folder / component / "config.json", quantization_config=None)
    load_checkpoint(folder)


@pytest.mark.parametrize(("name", "value"), [("layers_per_block", 10**6), ("transformer_layers_per_block", [1, 10**6])])
def test_a_config_of_a_million_layers_is_refused_before_anything_is_built(
    name: str, value: Any, copied: Callable[[str], Path]
) -> None:
    folder = copied("sd")
    edit(folder / "unet" / "config.json", **{name: value})
    refused(lambda: read_layout(folder), name, "more than 1000 layers")
