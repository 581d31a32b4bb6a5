"""compress/sources/pretrained.py: components against from_pretrained, and files that lack or add a tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from diffusers import AsymmetricAutoencoderKL, AutoencoderTiny
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel
from transformers import T5ForConditionalGeneration as CompleteT5

from diffpress.compress.sources.pretrained import ENCODER, load_diffusers_model, load_text_encoder
from diffpress.runtime.errors import InvalidInputError
from tests.pipelines import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer, vae, vq

CLIP: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 8,
    "projection_dim": 12,
}
T5: dict[str, Any] = {"vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2, "num_heads": 2}
T5["decoder_start_token_id"] = 0
IDS = torch.arange(8)[None]


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def change(folder: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    (file,) = folder.glob("*.safetensors")
    save_file(edit(load_file(file)), file, metadata={"format": "pt"})
    return file


def saved(model: Any, folder: Path) -> None:
    model.save_pretrained(folder)


def published(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Name CLIP's tensors as published files do, with a buffer that older versions stored."""
    return {f"text_model.{name}": tensor for name, tensor in state.items()} | {
        "text_model.embeddings.position_ids": torch.arange(8)[None]
    }


def hidden(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).last_hidden_state


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    CLIPTextModel(CLIPTextConfig(**CLIP)).save_pretrained(tmp_path / "clip")
    change(tmp_path / "clip", published)
    return tmp_path / "clip"


@pytest.fixture
def t5(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    T5EncoderModel(T5Config(**T5)).save_pretrained(tmp_path / "t5")
    return tmp_path / "t5"


# --- text encoders ---------------------------------------------------------------------------------------------


def test_text_encoders_are_those_of_transformers(clip: Path, t5: Path) -> None:
    for folder, kind in ((clip, "CLIPTextModel"), (t5, "T5EncoderModel")):
        found, theirs = load_text_encoder(folder, kind), getattr(transformers, kind).from_pretrained(folder)
        assert torch.equal(hidden(found), hidden(theirs)) and not found.training


@pytest.mark.parametrize("tied", [True, False])
def test_the_encoder_of_a_complete_t5_is_loaded(tied: bool, tmp_path: Path) -> None:
    complete = CompleteT5(T5Config(**{**T5, "tie_word_embeddings": tied})).eval()
    complete.save_pretrained(tmp_path)
    # as in the files of T5 v1.1; transformers ties the head when it saves
    file = change(tmp_path, lambda state: {**state, "lm_head.weight": torch.ones(40, 16)})
    assert any(name.startswith("decoder.") for name in load_file(file))
    with torch.no_grad():
        expected = complete.encoder(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden(load_text_encoder(tmp_path, "T5EncoderModel")), expected)


@pytest.mark.parametrize("kept", ["shared.weight", "encoder.embed_tokens.weight"])
def test_the_embedding_of_t5_is_stored_under_either_name(kept: str, t5: Path) -> None:
    expected = hidden(T5EncoderModel.from_pretrained(t5))

    def rename(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        embedding = next(tensor for name, tensor in state.items() if tensor.shape == (40, 16))
        others = {name: tensor for name, tensor in state.items() if tensor.shape != (40, 16)}
        return {**others, kept: embedding}

    change(t5, rename)
    assert torch.equal(hidden(load_text_encoder(t5, "T5EncoderModel")), expected)


def test_the_text_half_of_a_complete_clip_is_loaded(tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(text_config=CLIP, vision_config={**vision, "image_size": 8, "patch_size": 4}, projection_dim=12)
    complete = CLIPModel(config).eval()
    complete.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = complete.text_model(input_ids=IDS).last_hidden_state
    assert torch.equal(hidden(load_text_encoder(tmp_path, "CLIPTextModel")), expected)


@pytest.mark.parametrize("index", range(6))
def test_a_missing_tensor_of_a_text_encoder_is_named(index: int, clip: Path, t5: Path) -> None:
    for folder, kind in ((clip, "CLIPTextModel"), (t5, "T5EncoderModel")):
        (file,) = folder.glob("*.safetensors")
        names = sorted(name for name in load_file(file) if not name.endswith(("position_ids", "shared.weight")))
        gone = names[index * (len(names) - 1) // 5]
        remaining = {name: tensor for name, tensor in load_file(file).items() if name != gone}
        save_file(remaining, file, metadata={"format": "pt"})
        refused(lambda: load_text_encoder(folder, kind), str(file), f"'{gone}' is missing")  # noqa: B023


def test_a_projection_is_missing_from_a_model_without_one(clip: Path) -> None:
    refused(lambda: load_text_encoder(clip, "CLIPTextModelWithProjection"), "'text_projection.weight' is missing")


LAYER = "text_model.encoder.layers.1.mlp.fc1.weight"


def test_a_foreign_tensor_is_named_as_in_its_file_where_prefixes_are_mixed(clip: Path) -> None:
    change(clip, lambda state: {k.removeprefix("text_model."): t for k, t in state.items()})
    file = change(clip, lambda state: {**state, "text_model.adapter.weight": torch.ones(3)})
    refused(lambda: load_text_encoder(clip, "CLIPTextModel"), str(file), "'text_model.adapter.weight'")


def test_foreign_misshapen_and_broken_tensors_of_a_text_encoder_are_named(clip: Path) -> None:
    (file,) = clip.glob("*.safetensors")
    state = load_file(file)

    def refuse(tensors: dict[str, torch.Tensor], *words: str) -> None:
        change(clip, lambda _: {**state, **tensors})
        refused(lambda: load_text_encoder(clip, "CLIPTextModel"), str(file), *words)

    refuse({"text_model.adapter.weight": torch.ones(3)}, "'text_model.adapter.weight'", "does not belong")
    refuse({LAYER: torch.ones(3, 3)}, f"'{LAYER}'", "[3, 3]", "[32, 16]")
    for value in (float("nan"), float("inf")):
        refuse({LAYER: torch.full((32, 16), value)}, f"'{LAYER}'", "NaN or infinite")
    refuse({f"{LAYER}.absmax": torch.ones(3)}, f"'{LAYER}.absmax'", "already quantized")
    refuse({LAYER: torch.ones(32, 16).to(torch.int8)}, f"'{LAYER}'", "already quantized")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_a_text_encoder_in_every_floating_point_type_is_loaded_as_float32(dtype: torch.dtype, clip: Path) -> None:
    change(clip, lambda state: {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()})
    theirs = CLIPTextModel.from_pretrained(clip, dtype=torch.float32)
    found = load_text_encoder(clip, "CLIPTextModel")
    assert {parameter.dtype for parameter in found.parameters()} == {torch.float32}
    assert torch.equal(hidden(found), hidden(theirs))


def test_a_missing_shard_is_named(clip: Path) -> None:
    (file,) = clip.glob("*.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(file), "model-00001-of-00002.safetensors")}
    (clip / "model.safetensors.index.json").write_text(json.dumps(index))
    file.unlink()
    refused(lambda: load_text_encoder(clip, "CLIPTextModel"), "model-00001-of-00002.safetensors", "missing")


def test_an_invalid_config_is_one_line(clip: Path) -> None:
    file = clip / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "num_attention_heads": 3}))
    refused(lambda: load_text_encoder(clip, "CLIPTextModel"), str(clip), "cannot be loaded")


def test_nothing_is_printed(clip: Path, t5: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    complete = CompleteT5(T5Config(**T5))
    complete.save_pretrained(tmp_path / "complete")
    saved(vae(), tmp_path / "vae")
    change(tmp_path / "vae", lambda state: {k: v for k, v in state.items() if not k.startswith(ENCODER)})
    file = change(clip, lambda state: {k: v for k, v in state.items() if k != LAYER})
    capfd.readouterr()
    load_text_encoder(tmp_path / "complete", "T5EncoderModel")
    load_text_encoder(t5, "T5EncoderModel")
    load_diffusers_model(tmp_path / "vae", "AutoencoderKL", optional=ENCODER)
    refused(lambda: load_text_encoder(clip, "CLIPTextModel"), str(file))
    assert capfd.readouterr() == ("", "")


# --- decoders --------------------------------------------------------------------------------------------------


def tiny_vae() -> AutoencoderTiny:
    widths: dict[str, Any] = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(**widths, num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1))


def asymmetric_vae() -> AsymmetricAutoencoderKL:
    down: dict[str, Any] = {"down_block_types": ("DownEncoderBlock2D",) * 2, "down_block_out_channels": (8, 16)}
    up: dict[str, Any] = {"up_block_types": ("UpDecoderBlock2D",) * 2, "up_block_out_channels": (16, 24)}
    return AsymmetricAutoencoderKL(**down, **up, norm_num_groups=8)


@pytest.mark.parametrize("build", [vae, vq, tiny_vae, asymmetric_vae])
def test_a_decoder_is_that_of_diffusers_with_or_without_its_encoder(
    build: Callable[[], nn.Module], tmp_path: Path
) -> None:
    theirs: Any = build()
    theirs.eval().save_pretrained(tmp_path)
    latents = torch.randn(2, theirs.config.latent_channels, 4, 4)
    with torch.no_grad():
        expected = theirs.decode(latents, return_dict=False)[0]
        for edit in (lambda state: state, lambda state: {k: v for k, v in state.items() if not k.startswith(ENCODER)}):
            change(tmp_path, edit)
            found: Any = load_diffusers_model(tmp_path, type(theirs).__name__, optional=ENCODER)
            assert torch.equal(found.decode(latents, return_dict=False)[0], expected)
    change(tmp_path, lambda state: dict(list(state.items())[:-1]))
    refused(lambda: load_diffusers_model(tmp_path, type(theirs).__name__, optional=ENCODER), "is missing")


def test_a_missing_codebook_is_named(tmp_path: Path) -> None:
    saved(vq(), tmp_path)
    change(tmp_path, lambda state: {name: tensor for name, tensor in state.items() if "quantize" not in name})
    refused(lambda: load_diffusers_model(tmp_path, "VQModel", optional=ENCODER), "'quantize.embedding.weight'")


def test_an_unknown_class_is_one_line(tmp_path: Path) -> None:
    saved(vae(), tmp_path)
    refused(lambda: load_diffusers_model(tmp_path, "NoSuchModel"), str(tmp_path / "config.json"), "NoSuchModel")


def test_the_tiny_text_encoders_of_the_other_tests_are_complete(tmp_path: Path) -> None:
    clip_encoder(clip_tokenizer()).save_pretrained(tmp_path / "clip")
    t5_encoder(t5_tokenizer()).save_pretrained(tmp_path / "t5")
    load_text_encoder(tmp_path / "clip", "CLIPTextModel")
    load_text_encoder(tmp_path / "t5", "T5EncoderModel")
