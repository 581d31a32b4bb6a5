"""compress/quantization/layer_selection.py: which layer gets which format, from a recipe's words."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from diffpress.compress.config import QuantizeConfig
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.layer_selection import choose_formats, rounded_outputs
from diffpress.runtime.errors import InvalidInputError

FORMATS = ("int8", "int8_weight_only", "fp8", "int4", "w4a8")


def config(**settings) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 2, "batch": 2, **settings})


@pytest.mark.parametrize("kind", FORMATS)
def test_the_stages_format_goes_to_what_is_not_fragile(kind, unet):
    chosen, sensitive_layers = (
        choose_formats(unet.model, config(format=kind)),
        adapter_for(unet.model).sensitive_layers(unet.model),
    )
    assert {chosen[name] for name in chosen if name not in sensitive_layers} == {kind}
    assert {chosen[name] for name in chosen if name in sensitive_layers} == {"int8_weight_only"}
    assert "conv_in" not in chosen and "time_embedding.linear_1" in chosen


def test_nothing_is_kept_back_where_fragile_layers_are_not_kept(unet):
    chosen = choose_formats(unet.model, config(keep_sensitive_layers=False))
    assert set(chosen.values()) == {"int8"} and {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(chosen)


def test_the_longest_prefix_decides_and_keep_is_short_for_float(unet):
    format_overrides = {"mid_block": "w4a8", "mid_block.attentions": "int4", "mid_block.attentions.0.to_q": "float"}
    format_overrides |= {"conv_in": "int8"}
    chosen = choose_formats(unet.model, config(format_overrides=format_overrides, keep=("mid_block.resnets.1",)))
    assert chosen["mid_block.resnets.0.conv1"] == "w4a8" and chosen["mid_block.attentions.0.to_k"] == "int4"
    assert "mid_block.attentions.0.to_q" not in chosen and "mid_block.resnets.1.conv1" not in chosen
    assert chosen["conv_in"] == "int8"  # who names a fragile layer means it
    assert chosen["up_blocks.0.resnets.0.conv1"] == "int8"
    kept = choose_formats(unet.model, config(format_overrides={"mid_block.attentions": "int4"}, keep=("mid_block",)))
    assert kept["mid_block.attentions.0.to_q"] == "int4" and "mid_block.resnets.0.conv1" not in kept


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_overrides": {"up_blocks.7": "int4"}}, "format_overrides names 'up_blocks.7', and no layer"),
        ({"ignored_layers": ("up_blocks.7",)}, "ignored_layers names 'up_blocks.7', and no layer"),
        ({"format_overrides": {"mid_block": "fp8"}}, "fp8 and int8 in one model"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(settings, message, unet):
    with pytest.raises(InvalidInputError, match=message) as caught:
        choose_formats(unet.model, config(**settings))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int5"},
        {"format_overrides": {"a": "bf16"}},
        {"format_overrides": {"a": "int4"}, "ignored_layers": ("a",)},
    ],
)
def test_a_recipe_with_an_unknown_format_or_a_contradiction_is_refused(settings):
    with pytest.raises(ValidationError):
        config(**settings)


def test_outputs_are_rounded_only_where_engines_multiply_integers(unet):
    for kind in FORMATS:
        settings = config(format=kind)
        formats = choose_formats(unet.model, settings)
        assert bool(rounded_outputs(unet, formats, settings)) == (kind in ("int8", "w4a8"))
