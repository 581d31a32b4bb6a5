"""compress/quantization/algorithms/mixed_precision.py and sensitivity.py: what is measured, what is chosen by it, what is refused."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import save_checkpoint
from diffpress.compress.config import BoundsConfig, QuantizeConfig
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.pipeline import run_stage
from diffpress.compress.quantization.algorithms.mixed_precision import _ordered, smallest
from diffpress.compress.quantization.algorithms.sensitivity import States, decibels, noise_by_layer, quantized_layers
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import draw, sample_trajectories
from diffpress.compress.recipe import Stage
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import GateFailedError, InvalidInputError


def config(**settings) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 4, "batch": 64, "output_correction": False, **settings})


class Costs:
    """An engine that is made up: every place gains a millisecond of its own, and weighs as many MiB as it gains."""

    def __init__(self, gains: dict[str, float], whole_ms: float) -> None:
        self.gains, self.whole_ms, self.asked = gains, whole_ms, []

    def gains_ms(self, quantization):
        return {layer: self.gains[layer] for layer in quantized_layers(quantization)}

    def latency_ratio(self, quantization):
        self.asked.append(quantized_layers(quantization))
        return 1.0 - sum(self.gains[layer] for layer in quantized_layers(quantization)) / self.whole_ms

    def size_mib(self, quantization):
        return 10.0 * self.latency_ratio(quantization)

    def context(self, ctx):
        return replace(ctx, costs_in=contextmanager(lambda checkpoint, engine: iter([self])))


@pytest.fixture(scope="module")
def quantized(unet, tmp_path_factory):
    from diffpress.compress.context import Context

    return quantize(unet, config(), Context(0, tmp_path_factory.mktemp("work"), unet))


@pytest.fixture(scope="module")
def noise(unet, quantized, tmp_path_factory):
    from diffpress.compress.context import Context

    ctx = Context(0, tmp_path_factory.mktemp("noise"), unet)
    return noise_by_layer(quantized, States(unet, config(), ctx), ctx)


@pytest.fixture
def known(noise, monkeypatch) -> None:
    """Noise that was measured once."""
    monkeypatch.setattr(
        "diffpress.compress.quantization.algorithms.mixed_precision.noise_by_layer", lambda *arguments: dict(noise)
    )


@pytest.fixture
def equal(quantized, known) -> Costs:
    """All places gain the same: noise alone orders them."""
    names = quantized_layers(quantized.quantization)
    return Costs(dict.fromkeys(names, 1.0), 2.0 * len(names))


# --- sensitivity -----------------------------------------------------------------------------------------------


def test_a_places_noise_is_that_of_the_model_with_this_place_alone_quantized(unet, quantized, noise, context):
    ctx = context(unet, data=False)
    calls = sample_trajectories(unet.model, unet, 4, config().batch, ctx)
    drawn = draw(calls, 64, torch.Generator().manual_seed(0))
    inputs = {name: value.numpy() for name, value in drawn.items()}
    exact = TorchNetwork(unet.model, unet.spec).run(inputs)
    names = quantized_layers(quantized.quantization)
    assert list(noise) == names and set(names) > set(quantized.quantization.layers)  # sums of blocks are among them
    for name in (names[0], names[-1], "mid_block.resnets.0", "down_blocks.0.resnets.0.conv1"):
        alone = quantized.quantization.without([other for other in names if other != name])
        model = fake_quantized(unet.evolve(quantization=alone))
        found = TorchNetwork(model, unet.spec).run(inputs)
        assert decibels(noise[name]) == pytest.approx(sqnr_db(exact, found), abs=0.01), name


def test_noise_of_all_places_is_about_the_sum_of_each(unet, quantized, noise, context):
    whole = States(unet, config(), context(unet, data=False)).noise(fake_quantized(quantized))
    assert decibels(sum(noise.values())) == pytest.approx(decibels(whole), abs=2.0)


def test_what_a_killed_run_measured_is_not_measured_again(unet, quantized, noise, context, monkeypatch):
    class Killed(Exception):
        pass

    ctx, calls, measure = context(unet, data=False), [], States.noise
    states = States(unet, config(), ctx)

    def killing(self, model):
        calls.append(1)
        if len(calls) == 6:
            raise Killed
        return measure(self, model)

    monkeypatch.setattr(States, "noise", killing)
    with pytest.raises(Killed):
        noise_by_layer(quantized, states, ctx)
    assert noise_by_layer(quantized, states, ctx) == pytest.approx(noise)
    assert len(calls) == len(noise) + 1


# --- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 4, 9])
def test_bisection_finds_the_first_that_holds(first):
    asked = []
    assert smallest(0, 9, lambda k: asked.append(k) or k >= first) == first
    assert len(asked) <= 5


def test_bisection_ends_at_the_top_where_nothing_holds():
    assert smallest(2, 9, lambda k: False) == 9


def test_places_go_by_noise_for_what_they_are_worth():
    noise = {"a": 4.0, "b": 4.0, "c": 1.0, "idle": 1e-9, "slower": 2.0}
    worth = {"a": 1.0, "b": 2.0, "c": 1.0, "idle": 0.0, "slower": -3.0}
    assert _ordered(noise, worth) == ["slower", "a", "b", "c", "idle"]


def test_the_noisiest_layers_go_back_until_the_sqnr_is_measured_to_be_there(unet, quantized, noise, equal, context):
    ctx = equal.context(context(unet, data=False))
    names = sorted(noise, key=lambda layer: (-noise[layer], layer))
    found = quantize(unet, config(bounds={"min_sqnr_db": decibels(sum(noise.values())) + 6.0}), ctx)
    kept, mixed = quantized_layers(found.quantization), ctx.notes["mixed"]
    k = len(names) - len(kept)
    assert 0 < k < len(names) / 2 and set(kept) == set(names[k:]) and mixed["in_float"] == names[:k]
    states = States(unet, config(), ctx)
    least = decibels(sum(noise.values())) + 6.0
    assert decibels(states.noise(fake_quantized(found))) >= least
    one_less = unet.evolve(quantization=quantized.quantization.without(names[: k - 1]))
    assert decibels(states.noise(fake_quantized(one_less))) < least
    assert mixed["chosen"]["sqnr_db"] >= least > mixed["all_quantized"]["sqnr_db"]


def test_with_bounds_on_the_cost_alone_all_the_quality_is_taken_that_they_allow(unet, noise, equal, context):
    ctx = equal.context(context(unet, data=False))
    found = quantize(unet, config(bounds={"max_latency_ratio": 0.8}), ctx)
    kept = quantized_layers(found.quantization)  # each of n places is worth 0.5 / n
    assert len(kept) == -(-len(noise) * 2 // 5) and equal.latency_ratio(found.quantization) <= 0.8
    assert min(noise[layer] for layer in set(noise) - set(kept)) >= max(noise[layer] for layer in kept)


def test_where_the_size_is_in_the_way_bytes_decide_the_order(unet, quantized, noise, known, context):
    """The engine gains by all alike, and what its file weighs is that of the weights."""
    weights = {n: p.numel() for n, p in unet.model.named_parameters() if n.endswith("weight")}
    sizes = {layer: float(weights.get(f"{layer}.weight", 0)) for layer in noise}

    class Weighed(Costs):
        def size_mib(self, quantization):
            return sum(sizes.values()) - 0.75 * sum(sizes[layer] for layer in quantization.layers)

    costs = Weighed(dict.fromkeys(noise, 1.0), 2.0 * len(noise))
    bound = costs.size_mib(quantized.quantization)
    least = decibels(sum(noise.values())) + 3.0
    by_time = quantize(unet, config(bounds={"min_sqnr_db": least}), costs.context(context(unet, data=False)))
    by_time = by_time.quantization
    ctx = costs.context(context(unet, data=False))
    limit = 0.5 * (bound + costs.size_mib(by_time))
    by_size = quantize(unet, config(bounds={"min_sqnr_db": least, "max_size_mib": limit}), ctx).quantization
    assert costs.size_mib(by_size) <= limit < costs.size_mib(by_time)
    assert ctx.notes["mixed"]["chosen"]["sqnr_db"] >= least


def test_bounds_that_contradict_each_other_fail_as_a_gate_and_say_by_how_much(unet, noise, equal, context):
    ctx = equal.context(context(unet, data=False))
    with pytest.raises(GateFailedError) as caught:
        quantize(unet, config(bounds={"min_sqnr_db": 60, "max_latency_ratio": 0.55}), ctx)
    message = str(caught.value)
    assert "\n" not in message and "max_latency_ratio is 0.55" in message and "latency_ratio is 0." in message
    assert "all quantized: sqnr_db" in message and caught.value.exit_code == 1


def test_a_mixture_with_nothing_left_is_no_success(unet, known, context):
    with pytest.raises(GateFailedError, match="nothing would be left in low precision"):
        quantize(unet, config(bounds={"min_sqnr_db": 199}), context(unet, data=False))


def test_the_frechet_distance_is_of_the_mixture_itself_and_found_by_bisection(unet, noise, equal, context, monkeypatch):
    names = sorted(noise, key=lambda layer: (-noise[layer], layer))
    scored = []

    def frechet(checkpoint, bounds, costs):
        def ratio(quantization):
            scored.append(len(names) - len(quantized_layers(quantization)))
            return 1.0 + 0.01 * len(quantized_layers(quantization))

        return ratio

    monkeypatch.setattr("diffpress.compress.quantization.algorithms.mixed_precision._frechet", frechet)
    monkeypatch.setattr(
        "diffpress.compress.quantization.algorithms.mixed_precision.load_features", lambda path, spec: None
    )
    ctx = equal.context(context(unet, data=False))
    found = quantize(unet, config(bounds={"max_frechet_ratio": 1.105}), ctx)
    assert len(quantized_layers(found.quantization)) == 10 and set(quantized_layers(found.quantization)) == set(
        names[-10:]
    )
    assert len(scored) == len(set(scored)) <= 8


def test_without_an_engine_macs_stand_for_the_gain_and_it_is_said(unet, noise, known, context, capsys):
    ctx = context(unet, data=False)
    least = decibels(sum(noise.values())) + 3.0
    quantize(unet, config(bounds={"min_sqnr_db": least}), ctx)
    row = ctx.notes["mixed"]["places"]["down_blocks.0.resnets.0.conv1"]
    assert "taken to be its MACs" in capsys.readouterr().out
    assert row["macs"] == 16 * 16 * 9 * 64 and row["bytes"] == 16 * 16 * 9 * 3
    assert ctx.notes["mixed"]["places"]["time_embedding.linear_1"]["macs"] == 0  # computes in float all the same


@pytest.mark.parametrize("name", ["max_latency_ratio", "max_size_mib"])
def test_bounds_on_an_engine_are_refused_at_once_where_there_is_none(name, unet, context, monkeypatch):
    monkeypatch.setattr(
        "diffpress.compress.quantization.quantize.calibrate", lambda *arguments: pytest.fail("calibrated first")
    )
    with pytest.raises(InvalidInputError, match=f"{name} is measured in an engine"):
        quantize(unet, config(bounds={name: 1}), context(unet, data=False))


def test_images_that_cannot_be_scored_are_refused_at_once(unet, context, monkeypatch):
    monkeypatch.setattr(
        "diffpress.compress.quantization.quantize.calibrate", lambda *arguments: pytest.fail("calibrated first")
    )
    with pytest.raises(InvalidInputError, match=r"features.onnx.*\[1, 8, 8\]"):
        quantize(unet, config(bounds={"max_frechet_ratio": 1.1}), context(unet, data=False))


# --- the result is data ----------------------------------------------------------------------------------------


def test_places_in_float_take_all_their_data_along_and_no_others(quantized):
    amax = {"a.weight": 1, "a.input": 1, "a": 1, "a.b.input": 1, "ab.weight": 1}
    tensors = {key: torch.ones(()) for key in amax}
    formats, svdquant = (
        dict.fromkeys(("a", "a.b", "ab"), "fp8"),
        dict.fromkeys(("a.up", "a.down", "ab.up"), tensors["a"]),
    )
    smooth = dict.fromkeys(("a", "a.b"), tensors["a"])
    found = replace(quantized.quantization, amax=tensors, formats=formats, smooth=smooth, svdquant=svdquant).without(
        ["a"]
    )
    assert set(found.amax) == {"a", "a.b.input", "ab.weight"} and set(found.svdquant) == {"ab.up"}
    assert set(found.formats) == {"a.b", "ab"} and set(found.smooth) == {"a.b"}


def test_a_mixture_is_recorded_saved_and_read_again(unet, noise, context, tmp_path, output):
    ctx = context(unet, data=False)
    stage = Stage("quantize", config(bounds=BoundsConfig(min_sqnr_db=decibels(sum(noise.values())) + 3.0)))
    found = run_stage(unet, stage, tmp_path / "stage", ctx)
    mixed = found.history[-1].changed["mixed"]
    assert mixed["in_float"] and not set(mixed["in_float"]) & set(quantized_layers(found.quantization))
    assert list(mixed["places"]) == sorted(noise, key=lambda layer: -noise[layer])
    save_checkpoint(found, tmp_path / "again")
    again = load_checkpoint(str(tmp_path / "again"))
    assert again.hash == found.hash and np.array_equal(output(again), output(found))
    assert again.history[-1].changed["mixed"] == mixed
