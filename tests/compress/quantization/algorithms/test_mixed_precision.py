"""compress/quantization/algorithms/mixed_precision.py and sensitivity.py: measurements, choice and refusals."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, Quantization, save_checkpoint
from diffpress.compress.context import Context, EngineCosts
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.pipeline import run_stage
from diffpress.compress.quantization.algorithms.mixed_precision import _noise_order, smallest
from diffpress.compress.quantization.algorithms.sensitivity import (
    ROWS_TO_ORDER,
    OutputNoise,
    decibels,
    noise_by_layer,
    quantized_layers,
)
from diffpress.compress.quantization.config import BoundsConfig, QuantizeConfig
from diffpress.compress.quantization.quantize import quantize, trajectories_of
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.stages import Stage
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from tests.compress.quantization.scales import scales_of


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 4, "batch": 64, "output_correction": False, **settings})


class FakeCosts:
    """A fake engine: every module has a given gain in ms, and size is proportional to latency."""

    def __init__(self, gains: dict[str, float], float_ms: float) -> None:
        self.gains, self.float_ms = gains, float_ms
        self.evaluated: list[list[str]] = []

    def gains_ms(self, quantization: Quantization) -> dict[str, float]:
        return {layer: self.gains[layer] for layer in quantized_layers(quantization)}

    def latency_ratio(self, quantization: Quantization) -> float:
        self.evaluated.append(quantized_layers(quantization))
        return 1.0 - sum(self.gains[layer] for layer in quantized_layers(quantization)) / self.float_ms

    def size_mib(self, quantization: Quantization) -> float:
        return 10.0 * self.latency_ratio(quantization)

    def context(self, ctx: Context) -> Context:
        return replace(
            ctx, open_engine_costs=contextmanager(lambda checkpoint, engine: iter([cast(EngineCosts, self)]))
        )


@pytest.fixture(scope="module")
def quantized(unet: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    return quantize(unet, config(), Context(0, tmp_path_factory.mktemp("work"), unet))


def output_noise(unet: Checkpoint, quantized: Checkpoint, ctx: Context) -> OutputNoise:
    return OutputNoise(quantized, trajectories_of(unet, config(bounds={"min_sqnr_db": 0.0}), ctx), ctx.seed)


@pytest.fixture(scope="module")
def noise(unet: Checkpoint, quantized: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> dict[str, float]:
    ctx = Context(0, tmp_path_factory.mktemp("noise"), unet)
    return noise_by_layer(quantized, output_noise(unet, quantized, ctx), ctx)


@pytest.fixture
def cached_noise(noise: dict[str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the noise measurement by the cached result."""
    monkeypatch.setattr(
        "diffpress.compress.quantization.algorithms.mixed_precision.noise_by_layer", lambda *arguments: dict(noise)
    )


@pytest.fixture
def equal_costs(quantized: Checkpoint, cached_noise: None) -> FakeCosts:
    """All modules gain the same, so noise alone determines the order."""
    names = quantized_layers(scales_of(quantized))
    return FakeCosts(dict.fromkeys(names, 1.0), 2.0 * len(names))


# --- sensitivity -----------------------------------------------------------------------------------------------


def test_a_modules_noise_is_that_of_the_model_with_only_this_module_quantized(
    unet: Checkpoint, quantized: Checkpoint, noise: dict[str, float], context: Callable[..., Context]
) -> None:
    dataset = trajectories_of(unet, config(bounds={"min_sqnr_db": 0.0}), context(unet, data=False))
    drawn = dataset.draw(64, torch.Generator().manual_seed(0))
    inputs = {name: value[:ROWS_TO_ORDER].numpy() for name, value in drawn.inputs.items()}
    exact = TorchNetwork(unet.model, unet.spec).run(inputs)
    np.testing.assert_allclose(drawn.outputs[:ROWS_TO_ORDER].numpy(), exact, rtol=1e-4, atol=1e-5)
    names = quantized_layers(scales_of(quantized))
    assert list(noise) == names and set(names) > set(scales_of(quantized).layers)  # also residual sums
    for name in (names[0], names[-1], "mid_block.resnets.0", "down_blocks.0.resnets.0.conv1"):
        alone = scales_of(quantized).without([other for other in names if other != name])
        model = fake_quantized(unet.evolve(quantization=alone))
        found = TorchNetwork(model, unet.spec).run(inputs)
        assert decibels(noise[name]) == pytest.approx(sqnr_db(exact, found), abs=0.01), name


def test_the_noise_of_a_set_is_measured_on_the_set_and_about_the_sum_of_its_modules(
    unet: Checkpoint, quantized: Checkpoint, noise: dict[str, float], context: Callable[..., Context]
) -> None:
    found = output_noise(unet, quantized, context(unet, data=False))
    assert decibels(found.of(noise)) == pytest.approx(decibels(sum(noise.values())), abs=2.0)
    assert decibels(found.of(())) > 90.0  # nothing is quantized


def test_measurements_of_a_killed_run_are_not_repeated(
    unet: Checkpoint,
    quantized: Checkpoint,
    noise: dict[str, float],
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class KilledError(Exception):
        pass

    ctx, measure = context(unet, data=False), OutputNoise.of
    calls: list[int] = []
    found = output_noise(unet, quantized, ctx)

    def killing(self: OutputNoise, modules: Collection[str], rows: int | None = None) -> float:
        calls.append(1)
        if len(calls) == 6:
            raise KilledError
        return measure(self, modules, rows)

    monkeypatch.setattr(OutputNoise, "of", killing)
    with pytest.raises(KilledError):
        noise_by_layer(quantized, found, ctx)
    assert noise_by_layer(quantized, found, ctx) == pytest.approx(noise)
    assert len(calls) == len(noise) + 1


# --- the choice ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0, 1, 4, 9])
def test_bisection_finds_the_first_value_that_holds(first: int) -> None:
    evaluated = []

    def holds(k: int) -> bool:
        evaluated.append(k)
        return k >= first

    assert smallest(0, 9, holds) == first
    assert len(evaluated) <= 5


def test_bisection_returns_the_upper_end_if_nothing_holds() -> None:
    assert smallest(2, 9, lambda k: False) == 9


def test_modules_are_ordered_by_noise_per_gain() -> None:
    noise = {"a": 4.0, "b": 4.0, "c": 1.0, "idle": 1e-9, "slower": 2.0}
    gain_ms = {"a": 1.0, "b": 2.0, "c": 1.0, "idle": 0.0, "slower": -3.0}
    assert _noise_order(noise, gain_ms) == ["slower", "a", "b", "c", "idle"]


def test_the_noisiest_layers_return_to_float_until_the_measured_sqnr_reaches_its_bound(
    unet: Checkpoint,
    quantized: Checkpoint,
    noise: dict[str, float],
    equal_costs: FakeCosts,
    context: Callable[..., Context],
) -> None:
    ctx = equal_costs.context(context(unet, data=False))
    names = sorted(noise, key=lambda layer: (-noise[layer], layer))
    found = quantize(unet, config(bounds={"min_sqnr_db": decibels(sum(noise.values())) + 6.0}), ctx)
    quantized_names, mixed = quantized_layers(scales_of(found)), ctx.notes["mixed"]
    k = len(names) - len(quantized_names)
    assert 0 < k < len(names) / 2 and set(quantized_names) == set(names[k:]) and mixed["in_float"] == names[:k]
    measured = output_noise(unet, quantized, ctx)
    min_sqnr = decibels(sum(noise.values())) + 6.0
    assert decibels(measured.of(names[k:])) >= min_sqnr > decibels(measured.of(names[k - 1 :]))
    alone = output_noise(unet, found, ctx)  # the result itself, without the quantizers of the first k
    assert alone.of(names[k:]) == pytest.approx(measured.of(names[k:]), rel=1e-3)
    assert mixed["chosen"]["sqnr_db"] >= min_sqnr > mixed["all_quantized"]["sqnr_db"]


def test_with_cost_bounds_only_the_best_quality_within_them_is_chosen(
    unet: Checkpoint, noise: dict[str, float], equal_costs: FakeCosts, context: Callable[..., Context]
) -> None:
    ctx = equal_costs.context(context(unet, data=False))
    found = quantize(unet, config(bounds={"max_latency_ratio": 0.8}), ctx)
    quantized_names = quantized_layers(scales_of(found))  # each of n modules gains 0.5 / n
    assert len(quantized_names) == -(-len(noise) * 2 // 5) and equal_costs.latency_ratio(scales_of(found)) <= 0.8
    assert min(noise[layer] for layer in set(noise) - set(quantized_names)) >= max(
        noise[layer] for layer in quantized_names
    )


def test_if_the_size_bound_fails_the_order_is_by_bytes(
    unet: Checkpoint,
    quantized: Checkpoint,
    noise: dict[str, float],
    cached_noise: None,
    context: Callable[..., Context],
) -> None:
    """All gains in the engine are equal, and the file size is that of the weights."""
    weights = {n: p.numel() for n, p in unet.model.named_parameters() if n.endswith("weight")}
    sizes = {layer: float(weights.get(f"{layer}.weight", 0)) for layer in noise}

    class WeightSizedCosts(FakeCosts):
        def size_mib(self, quantization: Quantization) -> float:
            return sum(sizes.values()) - 0.75 * sum(sizes[layer] for layer in quantization.layers)

    costs = WeightSizedCosts(dict.fromkeys(noise, 1.0), 2.0 * len(noise))
    bound = costs.size_mib(scales_of(quantized))
    min_sqnr = decibels(sum(noise.values())) + 3.0
    by_time = scales_of(
        quantize(unet, config(bounds={"min_sqnr_db": min_sqnr}), costs.context(context(unet, data=False)))
    )
    ctx = costs.context(context(unet, data=False))
    limit = 0.5 * (bound + costs.size_mib(by_time))
    by_size = scales_of(quantize(unet, config(bounds={"min_sqnr_db": min_sqnr, "max_size_mib": limit}), ctx))
    assert costs.size_mib(by_size) <= limit < costs.size_mib(by_time)
    assert ctx.notes["mixed"]["chosen"]["sqnr_db"] >= min_sqnr


def test_contradicting_bounds_fail_as_a_gate_and_report_by_how_much(
    unet: Checkpoint, noise: dict[str, float], equal_costs: FakeCosts, context: Callable[..., Context]
) -> None:
    ctx = equal_costs.context(context(unet, data=False))
    with pytest.raises(GateFailedError) as caught:
        quantize(unet, config(bounds={"min_sqnr_db": 60, "max_latency_ratio": 0.55}), ctx)
    message = str(caught.value)
    assert "\n" not in message and "max_latency_ratio is 0.55" in message and "latency_ratio is 0." in message
    assert "all quantized: sqnr_db" in message and caught.value.exit_code == 1


def test_a_result_without_quantized_layers_fails(
    unet: Checkpoint, cached_noise: None, context: Callable[..., Context]
) -> None:
    with pytest.raises(GateFailedError, match="no layer would remain quantized"):
        quantize(unet, config(bounds={"min_sqnr_db": 199}), context(unet, data=False))


def test_the_frechet_bound_is_measured_on_the_result_itself_by_bisection(
    unet: Checkpoint,
    noise: dict[str, float],
    equal_costs: FakeCosts,
    context: Callable[..., Context],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = sorted(noise, key=lambda layer: (-noise[layer], layer))
    k_scored = []

    def frechet(checkpoint: Checkpoint, bounds: BoundsConfig, costs: EngineCosts) -> Callable[[Quantization], float]:
        def ratio(quantization: Quantization) -> float:
            k_scored.append(len(names) - len(quantized_layers(quantization)))
            return 1.0 + 0.01 * len(quantized_layers(quantization))

        return ratio

    monkeypatch.setattr("diffpress.compress.quantization.algorithms.mixed_precision._frechet", frechet)
    monkeypatch.setattr(
        "diffpress.compress.quantization.algorithms.mixed_precision.load_features", lambda path, spec: None
    )
    ctx = equal_costs.context(context(unet, data=False))
    found = quantize(unet, config(bounds={"max_frechet_ratio": 1.105}), ctx)
    assert len(quantized_layers(scales_of(found))) == 10 and set(quantized_layers(scales_of(found))) == set(names[-10:])
    assert len(k_scored) == len(set(k_scored)) <= 8


def test_without_an_engine_macs_are_used_as_the_gain_and_this_is_logged(
    unet: Checkpoint,
    noise: dict[str, float],
    cached_noise: None,
    context: Callable[..., Context],
    caplog: pytest.LogCaptureFixture,
) -> None:
    ctx = context(unet, data=False)
    min_sqnr = decibels(sum(noise.values())) + 3.0
    with caplog.at_level("INFO", logger="diffpress"):
        quantize(unet, config(bounds={"min_sqnr_db": min_sqnr}), ctx)
    row = ctx.notes["mixed"]["places"]["down_blocks.0.resnets.0.conv1"]
    assert "MACs are used as the gain" in caplog.text
    assert row["macs"] == 16 * 16 * 9 * 64 and row["bytes"] == 16 * 16 * 9 * 3
    assert ctx.notes["mixed"]["places"]["time_embedding.linear_1"]["macs"] == 0  # weight-only: computes in float


@pytest.mark.parametrize("name", ["max_latency_ratio", "max_size_mib"])
def test_engine_bounds_are_refused_immediately_without_an_engine(
    name: str, unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffpress.compress.quantization.quantize.calibrate", lambda *arguments: pytest.fail("calibrated first")
    )
    with pytest.raises(InvalidInputError, match=f"{name} is measured in an engine"):
        quantize(unet, config(bounds={name: 1}), context(unet, data=False))


def test_images_that_cannot_be_scored_are_refused_immediately(
    unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "diffpress.compress.quantization.quantize.calibrate", lambda *arguments: pytest.fail("calibrated first")
    )
    with pytest.raises(InvalidInputError, match=r"features\.onnx.*\[1, 8, 8\]"):
        quantize(unet, config(bounds={"max_frechet_ratio": 1.1}), context(unet, data=False))


# --- the result is data ----------------------------------------------------------------------------------------


def test_removing_a_module_removes_all_its_data_and_no_others(quantized: Checkpoint) -> None:
    amax = {"a.weight": 1, "a.input": 1, "a": 1, "a.b.input": 1, "ab.weight": 1}
    tensors = {key: torch.ones(()) for key in amax}
    formats, svdquant = (
        dict.fromkeys(("a", "a.b", "ab"), "fp8"),
        dict.fromkeys(("a.up", "a.down", "ab.up"), tensors["a"]),
    )
    smooth = dict.fromkeys(("a", "a.b"), tensors["a"])
    found = replace(scales_of(quantized), amax=tensors, formats=formats, smooth=smooth, svdquant=svdquant).without(
        ["a"]
    )
    assert set(found.amax) == {"a", "a.b.input", "ab.weight"} and set(found.svdquant) == {"ab.up"}
    assert set(found.formats) == {"a.b", "ab"} and set(found.smooth) == {"a.b"}


def test_a_mixed_precision_result_is_recorded_saved_and_reloaded(
    unet: Checkpoint,
    noise: dict[str, float],
    context: Callable[..., Context],
    tmp_path: Path,
    output: Callable[[Checkpoint], torch.Tensor],
) -> None:
    ctx = context(unet, data=False)
    stage = Stage("quantize", config(bounds=BoundsConfig(min_sqnr_db=decibels(sum(noise.values())) + 3.0)))
    found = run_stage(unet, stage, tmp_path / "stage", ctx)
    mixed = found.history[-1].changed["mixed"]
    assert mixed["in_float"] and not set(mixed["in_float"]) & set(quantized_layers(scales_of(found)))
    assert list(mixed["places"]) == sorted(noise, key=lambda layer: -noise[layer])
    save_checkpoint(found, tmp_path / "again")
    again = load_checkpoint(str(tmp_path / "again"))
    assert again.hash == found.hash and np.array_equal(output(again), output(found))
    assert again.history[-1].changed["mixed"] == mixed
