"""runtime/conditioning.py: it round-trips through JSON; missing, unknown or invalid entries are refused by name."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

import pytest

from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput, conditioning_from_json
from diffpress.runtime.errors import InvalidInputError

ENCODER = {"graph": "text_encoder", "tokenizer": "tokenizer", "length": 77}
TEXT = Conditioning(
    "text",
    encoders=(TextEncoder("text_encoder", "tokenizer", 77, pad=49407), TextEncoder("t5", "t5_words", 8, lower=True)),
    inputs={
        "encoder_hidden_states": TextInput((10, 12), (("text_encoder.a", "t5.b"), 2)),
        "time_ids": TextInput((4,), (("size", "corner"),)),
    },
    zero_negative=True,
    guidance_input=True,
)


@pytest.mark.parametrize("conditioning", [Conditioning(), Conditioning("class", 10, null_label=10), TEXT])
def test_a_conditioning_round_trips_through_json(conditioning: Conditioning) -> None:
    assert conditioning_from_json(json.loads(json.dumps(asdict(conditioning)))) == conditioning


def test_missing_entries_mean_no_conditioning() -> None:
    assert conditioning_from_json({}) == Conditioning()


def test_sizes_and_masks_are_distinguished_from_features() -> None:
    assert TEXT.inputs["time_ids"].is_plain and not TEXT.inputs["encoder_hidden_states"].is_plain
    assert TextInput((7,), (("t5.attention_mask",),)).is_plain and not TextInput((7, 3), (7,)).is_plain


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "audio"}, "conditioning kind 'audio'"),
        ({"kind": "class", "classes": 0}, "number of classes"),
        ({"null_label": -1}, "negative"),
        ({"colour": 1}, "here: unknown entry 'colour'"),
        ({"encoders": [{"graph": "t5", "tokenizer": "t5_words"}]}, "here: .*length"),
        ({"encoders": [{"graph": "t5", "colour": 1}]}, "unknown entry 'colour'"),
        ({"encoders": [{**ENCODER, "length": 0}]}, "text_encoder: 0 tokens"),
        ({"inputs": [1]}, "here: "),
        ({"inputs": {"time_ids": {"shape": [4]}}}, "here: the entry 'rows' is missing"),
        ({"zero_negative": "no"}, "here: expected true or false"),
    ],
)
def test_broken_conditionings_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        conditioning_from_json(asdict(TEXT) | changes, "here")
