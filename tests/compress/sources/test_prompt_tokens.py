"""Prompts against diffusers' own pipelines: token ids, textual inversions of several vectors, tokenizer settings."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from transformers import AddedToken

from diffpress.compress.models.components import encode_prompts, load_component
from diffpress.compress.sources.layout import read_layout
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.prompts import open_tokenizer, tokenize
from tests.pipelines import tiny_pipeline

ODD = [
    "",
    " ",
    "a photo of a cat",
    'He said "a CAT" -- isn\'t it?',
    "🦊 naïve café, Ångström e\u0301, 雪山",
    "&lt;b&gt; a &amp; b &quot;cat&quot; <br/>",
    "line one\nline\ttwo\r\n  three ",
    "null\x00char and \u200bzero width",
    "a cat " * 60,
    "<|endoftext|> dog </s> <pad> <|startoftext|>",
    "(cat:1.3) [dog] {red|of} AND BREAK",
]
TOKEN = "<cat-toy>"
INVERTED = [
    f"a photo of a {TOKEN}",
    f"{TOKEN}, {TOKEN}!",
    "a cat",
    f"{TOKEN}_1 dog",
    f"{TOKEN.upper()} red",
    f"x{TOKEN}y",
]


def refused(call: Callable[[], object], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def opened(folder: Path) -> Any:
    return DiffusionPipeline.from_pretrained(folder, local_files_only=True)


@pytest.fixture
def copied(tiny_folder: Callable[..., Path], tmp_path: Path) -> Callable[[str], Path]:
    return lambda kind: shutil.copytree(tiny_folder(kind), tmp_path / kind)


@pytest.mark.parametrize("kind", ["sd", "sdxl", "pixart-alpha", "sd3", "flux"])
@pytest.mark.parametrize("tokenizer_json", [True, False])
def test_the_ids_of_odd_prompts_are_those_of_the_pipelines_tokenizers(
    kind: str, tokenizer_json: bool, tmp_path: Path
) -> None:
    folder = tiny_pipeline(kind, tmp_path / kind, tokenizer_json=tokenizer_json)
    spec, pipe, layout = load_checkpoint(folder).spec, opened(folder), read_layout(folder)
    for encoder in spec.conditioning.encoders:
        layout.tokenizer(encoder.tokenizer).save_pretrained(tmp_path / "exported")
        found = tokenize(open_tokenizer(tmp_path / "exported" / "tokenizer.json"), ODD, encoder)
        texts = [text.lower().strip() for text in ODD] if kind == "pixart-alpha" else ODD
        theirs = getattr(pipe, encoder.tokenizer)(
            texts, padding="max_length", max_length=encoder.length, truncation=True, return_tensors="np"
        )
        np.testing.assert_array_equal(found.ids, theirs.input_ids)
        np.testing.assert_array_equal(found.mask, theirs.attention_mask)


# --- textual inversion -----------------------------------------------------------------------------------------


def inverted(folder: Path, into: Path, vectors: int = 3) -> Path:
    """Save a pipeline whose text encoders have learned TOKEN as `vectors` vectors."""
    pipe = opened(folder)
    generator = torch.Generator().manual_seed(1)
    for number, (encoder, tokenizer) in enumerate(read_layout(folder).encoders):
        encoder, tokenizer = getattr(pipe, encoder), getattr(pipe, tokenizer)
        width = encoder.get_input_embeddings().weight.shape[1]
        learned = torch.randn(vectors, width, generator=generator)
        pipe.load_textual_inversion({TOKEN: learned}, text_encoder=encoder, tokenizer=tokenizer)
        assert number < 2
    pipe.save_pretrained(into)
    return into


@pytest.mark.parametrize("kind", ["sd", "sdxl", "lcm"])
@pytest.mark.parametrize("vectors", [1, 3])
def test_a_textual_inversion_of_several_vectors_is_expanded_as_in_diffusers(
    kind: str, vectors: int, tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = inverted(tiny_folder(kind), tmp_path / kind, vectors)
    pipe = opened(folder)
    with torch.no_grad():
        found = pipe.encode_prompt(INVERTED, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
    ours = encode_prompts(load_checkpoint(folder), INVERTED)["encoder_hidden_states"]
    np.testing.assert_allclose(ours, found[0].numpy(), rtol=0, atol=1e-5)
    # the other vectors have an effect: the first prompt differs from one without them
    if vectors > 1:
        tokenizer = pipe.tokenizer
        assert len(tokenizer(pipe.maybe_convert_prompt(INVERTED[0], tokenizer)).input_ids) == len(
            tokenizer(INVERTED[0]).input_ids
        ) + (vectors - 1)


def test_a_textual_inversion_beyond_the_tokenizers_limit_is_expanded(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    folder = inverted(tiny_folder("sd"), tmp_path / "sd")
    pipe, prompt = opened(folder), f"{'a cat ' * 30}{TOKEN}"
    encoder = load_checkpoint(folder).spec.conditioning.encoders[0]
    tokenizer = read_layout(folder).tokenizer("tokenizer").backend_tokenizer
    tokenize(tokenizer, ["a cat"], encoder)  # sets the truncation
    assert tokenize(tokenizer, [prompt], encoder).unread[0].endswith(f"{TOKEN} {TOKEN}_1 {TOKEN}_2")
    assert pipe.maybe_convert_prompt(prompt, pipe.tokenizer).endswith(f"{TOKEN} {TOKEN}_1 {TOKEN}_2")


def test_multi_vector_tokens_are_refused_where_the_pipeline_does_not_expand_them(
    copied: Callable[[str], Path],
) -> None:
    folder = copied("pixart-alpha")
    tokenizer = read_layout(folder).tokenizer("tokenizer")
    tokenizer.add_tokens([AddedToken(TOKEN), AddedToken(f"{TOKEN}_1")])
    tokenizer.save_pretrained(folder / "tokenizer")
    refused(lambda: read_layout(folder).tokenizer("tokenizer"), str(folder / "tokenizer"), TOKEN, "PixArtAlphaPipeline")


def test_a_tokenizer_with_more_tokens_than_its_encoder_has_embeddings_is_refused(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    tokenizer = read_layout(folder).tokenizer("tokenizer")
    tokenizer.add_tokens([TOKEN])
    tokenizer.save_pretrained(folder / "tokenizer")
    checkpoint = load_checkpoint(folder)
    refused(lambda: load_component(checkpoint, "text_encoder"), str(folder / "tokenizer"), TOKEN, "embeddings")


# --- tokenizer settings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("setting", "value"), [("padding_side", "left"), ("truncation_side", "left"), ("split_special_tokens", True)]
)
def test_a_tokenizer_setting_that_is_not_followed_is_refused(
    setting: str, value: Any, copied: Callable[[str], Path]
) -> None:
    folder = copied("sd")
    file = folder / "tokenizer" / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), setting: value}))
    refused(lambda: load_checkpoint(folder), str(file), setting, repr(value))


def test_the_class_of_a_tokenizer_is_the_one_in_the_index(copied: Callable[[str], Path]) -> None:
    folder = copied("sd")
    before = read_layout(folder).tokenizer("tokenizer")
    file = folder / "tokenizer" / "tokenizer_config.json"
    config = json.loads(file.read_text())
    del config["tokenizer_class"]
    file.write_text(json.dumps(config))
    (folder / "tokenizer" / "config.json").unlink(missing_ok=True)
    after = read_layout(folder).tokenizer("tokenizer")
    assert type(after) is type(before) and after("a cat!").input_ids == before("a cat!").input_ids
