"""compress/quantization/layer_selection.py: the settings determine the format of every layer."""

from __future__ import annotations

from typing import Any

import pytest

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.layer_selection import choose_formats, quantized_outputs
from diffpress.runtime.errors import InvalidInputError

FORMATS = ("int8", "int8_weight_only", "fp8", "int4", "w4a8")


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 2, "batch": 2, **settings})


@pytest.mark.parametrize("kind", FORMATS)
def test_the_stages_format_applies_to_all_but_sensitive_layers(kind: str, unet: Checkpoint) -> None:
    chosen, sensitive_layers = (
        choose_formats(unet.model, config(format=kind)),
        adapter_for(unet.model).sensitive_layers(unet.model),
    )
    assert {chosen[name] for name in chosen if name not in sensitive_layers} == {kind}
    assert {chosen[name] for name in chosen if name in sensitive_layers} == {"int8_weight_only"}
    assert "conv_in" not in chosen and "time_embedding.linear_1" in chosen


def test_all_layers_are_quantized_without_keep_sensitive_layers(unet: Checkpoint) -> None:
    chosen = choose_formats(unet.model, config(keep_sensitive_layers=False))
    assert set(chosen.values()) == {"int8"} and {"conv_in", "conv_out", "time_embedding.linear_1"} <= set(chosen)


def test_the_longest_prefix_decides_and_ignored_layers_is_short_for_float(unet: Checkpoint) -> None:
    format_overrides = {"mid_block": "w4a8", "mid_block.attentions": "int4", "mid_block.attentions.0.to_q": "float"}
    format_overrides |= {"conv_in": "int8"}
    chosen = choose_formats(
        unet.model, config(format_overrides=format_overrides, ignored_layers=("mid_block.resnets.1",))
    )
    assert chosen["mid_block.resnets.0.conv1"] == "w4a8" and chosen["mid_block.attentions.0.to_k"] == "int4"
    assert "mid_block.attentions.0.to_q" not in chosen and "mid_block.resnets.1.conv1" not in chosen
    assert chosen["conv_in"] == "int8"  # an override also applies to sensitive layers
    assert chosen["up_blocks.0.resnets.0.conv1"] == "int8"
    chosen_again = choose_formats(
        unet.model, config(format_overrides={"mid_block.attentions": "int4"}, ignored_layers=("mid_block",))
    )
    assert chosen_again["mid_block.attentions.0.to_q"] == "int4" and "mid_block.resnets.0.conv1" not in chosen_again


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"format_overrides": {"up_blocks.7": "int4"}}, r"format_overrides: no layer .* starts with 'up_blocks\.7'"),
        ({"ignored_layers": ("up_blocks.7",)}, r"ignored_layers: no layer .* starts with 'up_blocks\.7'"),
        ({"format_overrides": {"mid_block": "fp8"}}, "fp8 and int8 in one model"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(settings: dict[str, Any], message: str, unet: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        choose_formats(unet.model, config(**settings))
    assert "\n" not in str(caught.value)


def test_a_pattern_with_wildcards_covers_layers_and_the_modules_around_them(unet: Checkpoint) -> None:
    names = set(choose_formats(unet.model, config(keep_sensitive_layers=False)))
    attentions = {name for name in names if ".attentions." in name}
    queries = {name for name in attentions if name.endswith(".to_q")}
    chosen = choose_formats(unet.model, config(ignored_layers=("*.attentions.?",), keep_sensitive_layers=False))
    assert attentions and set(chosen) == names - attentions
    overrides = {"*.attentions.*": "w4a8", "*.attentions.*.to_q": "int4", "mid_block": "float"}
    chosen = choose_formats(unet.model, config(format_overrides=overrides))
    for name in queries:  # the pattern with the most letters decides
        assert chosen[name] == "int4"
    assert {chosen[name] for name in attentions - queries} == {"w4a8"}
    assert not any(name.startswith("mid_block.resnets") for name in chosen)


def test_a_whole_name_with_wildcards_is_not_a_prefix(unet: Checkpoint) -> None:
    chosen = choose_formats(unet.model, config(ignored_layers=("mid_block.resnets.*.conv1",)))
    assert "mid_block.resnets.0.conv1" not in chosen and "mid_block.resnets.0.conv2" in chosen


def test_a_pattern_that_matches_nothing_is_refused_with_the_nearest_names(unet: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match=r"matches 'mid_blok\.\*'; similar names: mid_block"):
        choose_formats(unet.model, config(ignored_layers=("mid_blok.*",)))


def test_a_module_that_is_float_anyway_may_be_ignored_but_not_be_given_a_format(unet: Checkpoint) -> None:
    ignored = config(ignored_layers=("conv_norm_out",))
    assert choose_formats(unet.model, ignored) == choose_formats(unet.model, config())
    with pytest.raises(InvalidInputError, match=r"format_overrides: no layer name .* starts with 'conv_norm_out'"):
        choose_formats(unet.model, config(format_overrides={"conv_norm_out": "int8"}))


@pytest.mark.parametrize(
    "settings",
    [
        {"format": "int5"},
        {"format_overrides": {"a": "bf16"}},
        {"format_overrides": {"a": "int4"}, "ignored_layers": ("a",)},
    ],
)
def test_a_recipe_with_an_unknown_format_or_a_contradiction_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        config(**settings)


def test_outputs_are_quantized_only_where_engines_multiply_integers(unet: Checkpoint) -> None:
    graph = trace_layer_graph(unet.model, unet.spec)
    for kind in FORMATS:
        settings = config(format=kind)
        formats = choose_formats(unet.model, settings)
        assert bool(quantized_outputs(unet.model, graph, formats, settings)) == (kind in ("int8", "w4a8"))
