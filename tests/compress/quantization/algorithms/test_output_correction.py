"""compress/quantization/algorithms/output_correction.py: a known slope and bias are recovered and corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import mean_sqnr_db, sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.models.widths import widths_of
from diffpress.compress.quantization.algorithms.output_correction import (
    MAX_SLOPE,
    corrects_output,
    fit_correction,
    helps,
    measure_corrections,
    moments,
    with_output_corrections,
)
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.seeds import OUTPUT_CORRECTION_SEED
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.denoiser import corrected
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection, make_plan
from diffpress.runtime.spec import DenoiserSpec

SCHEDULE = betas_schedule("linear", 100)
PLAN = make_plan("dpmpp_2m", 5, SCHEDULE)
SPEC = DenoiserSpec("v", SCHEDULE, (2, 6, 6), PLAN, Conditioning("class", 3, null_label=3))
ERRORS = {t: (0.05 * k - 0.1, (0.2 - 0.1 * k, 0.03 * k)) for k, t in enumerate(PLAN.timesteps)}


@dataclass
class AnalyticNetwork:
    """An analytic network with two channels and an error (slope, biases) per timestep."""

    errors: Mapping[float, tuple[float, tuple[float, ...]]] | None = None

    def __post_init__(self) -> None:
        integer, real = np.dtype(np.int64), np.dtype(np.float32)
        self.inputs: Mapping[str, np.dtype] = {"sample": real, "timestep": integer, "class_labels": integer}
        self.states: list[tuple[float, np.ndarray]] = []

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        x, t = inputs["sample"], float(inputs["timestep"][0])
        self.states.append((t, x))
        labels = inputs["class_labels"][:, None, None, None]
        out = np.sin(2 * x + t / 30) + (0.1 * labels + 0.2) * np.roll(x, 1, axis=1)
        slope, bias = (self.errors or {}).get(t, (0.0, (0.0, 0.0)))
        out = (1 + slope) * out + np.asarray(bias)[:, None, None]
        return out.astype(np.float32)


def measured_corrections(
    network: AnalyticNetwork, spec: DenoiserSpec = SPEC, batch: int = 4, count: int = 6
) -> dict[float, tuple[float, tuple[float, ...]]]:
    output_corrections = measure_corrections(
        network, AnalyticNetwork(), spec, count, batch, dummy_conditioning(spec, count)
    )
    return {t: (c.slope, c.bias) for t, c in zip(spec.plan.timesteps, output_corrections, strict=True)}


@pytest.mark.parametrize("solver", ["dpmpp_2m", "plms"])
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("batch", [4, 6])
def test_a_known_slope_and_bias_are_recovered_at_every_timestep(solver: str, guidance: float, batch: int) -> None:
    spec = SPEC.with_plan(replace(PLAN, solver=solver, guidance=guidance))
    for t, (slope, bias) in measured_corrections(AnalyticNetwork(ERRORS), spec, batch).items():
        assert slope == pytest.approx(ERRORS[t][0], abs=1e-5) and bias == pytest.approx(ERRORS[t][1], abs=1e-5)


def test_the_float_network_is_evaluated_on_the_states_that_the_corrected_sampler_visits() -> None:
    network, reference = AnalyticNetwork(ERRORS), AnalyticNetwork()
    output_corrections = measure_corrections(network, reference, SPEC, 4, 4, dummy_conditioning(SPEC, 4))
    for (t, x), (other_t, y) in zip(network.states, reference.states, strict=True):
        assert t == other_t and np.array_equal(x, y)
    deployed = AnalyticNetwork(ERRORS)
    seeds = range(OUTPUT_CORRECTION_SEED, OUTPUT_CORRECTION_SEED + 4)
    generate(deployed, SPEC, seeds, plan=replace(PLAN, output_corrections=output_corrections))
    for (_, x), (_, y) in zip(network.states, deployed.states, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_a_timestep_that_is_evaluated_twice_is_fitted_to_both_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SPEC.with_plan(replace(PLAN, solver="plms"))
    network, exact = AnalyticNetwork(), AnalyticNetwork()
    original_run = network.run
    # no slope and bias can compensate this error
    monkeypatch.setattr(network, "run", lambda inputs: original_run(inputs) + 0.1 * inputs["sample"] ** 2)
    labels = dummy_conditioning(SPEC, 6).cond["class_labels"]
    output_corrections = measure_corrections(network, exact, spec, 6, 6, dummy_conditioning(SPEC, 6))
    timestep = PLAN.timesteps[1]
    states = np.concatenate([x for t, x in exact.states if t == timestep])
    cond = {"sample": states, "timestep": np.full(12, round(timestep)), "class_labels": np.tile(labels, 2)}
    expected = fit_correction(moments(exact.run(cond), network.run(cond)), timestep)
    assert output_corrections[1].slope == pytest.approx(expected.slope) and output_corrections[1].bias == pytest.approx(
        expected.bias
    )


def test_with_noise_the_fit_matches_least_squares() -> None:
    draws = np.random.default_rng(1)
    out = draws.standard_normal((5, 3, 4, 4)) + np.arange(3)[:, None, None]
    out_q = 1.1 * out + 0.3 * draws.standard_normal((5, 3, 4, 4))
    columns = [out_q.transpose(1, 0, 2, 3).ravel(), *np.repeat(np.eye(3), 5 * 16, axis=1)]
    gain, *offset = np.linalg.lstsq(np.stack(columns, 1), out.transpose(1, 0, 2, 3).ravel(), rcond=None)[0]
    fit = fit_correction(moments(out[:2], out_q[:2]) + moments(out[2:], out_q[2:]), 1.0)
    nearest = gain * out_q + np.asarray(offset)[:, None, None]
    np.testing.assert_allclose(corrected(out_q, fit), nearest, atol=1e-6)


@pytest.mark.parametrize(("amplitude", "limited"), [(94.0, 1.0 + MAX_SLOPE), (0.3, 1.0 - MAX_SLOPE)])
def test_a_slope_that_no_loss_of_amplitude_explains_is_limited(amplitude: float, limited: float) -> None:
    out = np.random.default_rng(1).standard_normal((5, 3, 4, 4)) + np.arange(3)[:, None, None]
    fit = fit_correction(moments(out, amplitude * out + 2.0), 1.0)
    assert 1.0 + fit.slope == pytest.approx(limited)
    # the biases are those of the limited slope: the means agree
    means = corrected(amplitude * out + 2.0, fit).mean((0, 2, 3))
    np.testing.assert_allclose(means, out.mean((0, 2, 3)), atol=1e-4)


def test_corrections_of_points_and_sequences_have_one_bias_per_channel() -> None:
    out = np.random.default_rng(1).standard_normal((40, 2))
    for shape in ((40, 2), (10, 2, 4), (5, 2, 2, 2, 2)):
        x = out.reshape(shape)
        shift = np.array([0.1, -0.2]).reshape(-1, *[1] * (len(shape) - 2))
        fit = fit_correction(moments(x, x + shift), 1.0)
        assert fit.slope == pytest.approx(0.0) and fit.bias == pytest.approx((0.1, -0.2))


@pytest.mark.parametrize(
    ("gains", "kept"),
    [
        ([1.0, 1.2, 0.9, 1.1], True),
        ([3.0, -2.5, 2.0, -1.0], False),  # the mean gain is within its noise
        ([-1.0, -1.0, -1.0, -1.1], False),
        ([0.5], True),
        ([np.nan, 1.0], False),
    ],
)
def test_corrections_are_kept_only_for_a_gain_beyond_its_noise(gains: list[float], kept: bool) -> None:
    without = np.full(len(gains), 20.0)
    assert helps(without, without + np.array(gains)) is kept


@pytest.mark.parametrize(
    ("asked", "large", "measured"),
    [(None, False, True), (None, True, False), (True, True, True), (False, False, False)],
)
def test_by_default_only_models_that_are_not_large_are_corrected(
    asked: bool | None, large: bool, measured: bool
) -> None:
    with torch.device("meta"):
        model = nn.Linear(10_001 if large else 1, 10_000, bias=False)
    assert corrects_output(QuantizeConfig(output_correction=asked), model) is measured


@pytest.mark.parametrize("distort", [lambda x: -x, np.zeros_like, lambda x: x * np.nan], ids=["negated", "zero", "nan"])
def test_an_output_that_does_not_correlate_is_refused(
    distort: Callable[[np.ndarray], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = AnalyticNetwork()
    original_run = plain.run
    monkeypatch.setattr(plain, "run", lambda inputs: distort(original_run(inputs)))
    with pytest.raises(
        InvalidInputError, match=rf"timestep {PLAN.timesteps[0]:g} .* does not correlate .*ignored_layers: "
    ):
        measured_corrections(plain)


# --- in the stage ----------------------------------------------------------------------------------------------


def test_the_stage_brings_samples_closer_to_the_float_models(unet: Checkpoint, context: Callable[..., Context]) -> None:
    config: dict[str, Any] = {"samples": 32, "batch": 32, "calibration": {"percentile": 90.0}}
    plain = quantize(unet, QuantizeConfig(output_correction=False, **config), context(unet))
    better = quantize(unet, QuantizeConfig(**config), context(unet))
    assert not plain.spec.plan.output_corrections and len(better.spec.plan.output_corrections) == unet.spec.plan.steps
    assert better.spec.plan.without_corrections == plain.spec.plan and better.hash != plain.hash
    cond = dummy_conditioning(unet.spec, 32)
    expected = _samples(unet.model, unet, cond)
    before, after = (_samples(fake_quantized(c), c, cond) for c in (plain, better))
    assert sqnr_db(expected, after) > sqnr_db(expected, before) + 0.3
    trained = quantize(unet, QuantizeConfig(qat={"steps": 1, "warmup": 0, "trajectories": 2}, **config), context(unet))
    assert not trained.spec.plan.output_corrections  # training removes the mean error itself


class Points(nn.Module):
    """A network of two-dimensional points [B, 2, 1, 1]."""

    def __init__(self, width: int = 96) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(18, width), nn.Linear(width, 2)
        self.inner = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.register_buffer("frequencies", torch.exp(torch.linspace(0, 6, 8)) / 1000)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        angles = timestep.float()[:, None] * self.get_buffer("frequencies")
        x = nn.functional.silu(self.first(torch.cat([sample.flatten(1), angles.sin(), angles.cos()], 1)))
        for layer in self.inner:
            x = nn.functional.silu(layer(x))
        return self.last(x).reshape(sample.shape)


@pytest.fixture(scope="module")
def points() -> Checkpoint:
    """An epsilon model of two half moons, trained for a few seconds."""
    torch.manual_seed(0)
    random, schedule, model = np.random.default_rng(0), betas_schedule("linear", 1000), Points()
    alphas, sigmas = (torch.tensor(np.asarray(x), dtype=torch.float32) for x in (schedule.alphas, schedule.sigmas))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    for _ in range(1500):
        angle, side = random.uniform(0, np.pi, 256), random.integers(0, 2, 256)
        moons = np.stack([np.cos(angle) + side - 0.5, np.where(side, 0.25 - np.sin(angle), np.sin(angle) - 0.25)], 1)
        t, noise = torch.randint(0, 1000, (256,)), torch.randn(256, 2)
        x = alphas[t, None] * torch.tensor(moons, dtype=torch.float32) + sigmas[t, None] * noise
        loss = ((model(x[..., None, None], t).flatten(1) - noise) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    spec = DenoiserSpec("epsilon", schedule, (2, 1, 1), make_plan("ddim", 20, schedule, clip=False))
    return Checkpoint(model.eval(), spec, Source("custom", original=widths_of(model)))


@pytest.mark.parametrize("samples", [2, 32])
@pytest.mark.parametrize(("solver", "steps"), [("ddim", 20), ("dpmpp_2m", 10)])
def test_corrections_never_make_a_model_of_points_worse(
    samples: int, solver: str, steps: int, points: Checkpoint, tmp_path: Path
) -> None:
    """An epsilon model divides the error of the first step by alpha = 0.006."""
    plan = make_plan(solver, steps, points.spec.schedule, clip=False)
    checkpoint, ctx = points.evolve(spec=points.spec.with_plan(plan)), Context(0, tmp_path, points)
    quantized = quantize(checkpoint, QuantizeConfig(samples=samples, batch=32), ctx)
    network = TorchNetwork(fake_quantized(quantized), quantized.spec)
    exact = generate(TorchNetwork(points.model, checkpoint.spec), checkpoint.spec, range(256), batch=256)
    default, without = (
        generate(network, quantized.spec, range(256), plan=used, batch=256)
        for used in (quantized.spec.plan, quantized.spec.plan.without_corrections)
    )
    assert mean_sqnr_db(exact, default) >= mean_sqnr_db(exact, without)
    errors = (float(np.median(np.abs(found - exact))) for found in (default, without))
    assert next(errors) <= next(errors)
    assert ctx.notes["output_correction"]["kept"] == bool(quantized.spec.plan.output_corrections)


@pytest.mark.parametrize("slope", [0.2, 0.0])
def test_corrections_that_make_the_trajectory_worse_are_left_out_and_recorded(
    slope: float, points: Checkpoint, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", logger="diffpress")
    harmful = tuple(OutputCorrection(slope, (0.1, -0.1)) for _ in points.spec.plan.timesteps)
    monkeypatch.setattr(f"{with_output_corrections.__module__}.measure_corrections", lambda *_: harmful)
    ctx = Context(0, tmp_path, points)
    quantized = quantize(points, QuantizeConfig(samples=8, batch=8), ctx)
    noted = ctx.notes["output_correction"]
    assert quantized.spec.plan == points.spec.plan and not noted["kept"]
    assert noted["sqnr_db"] < noted["sqnr_db_without"] and noted["held_out_samples"] == 8
    assert "left out" in caplog.text


def test_the_decision_is_made_on_noise_that_was_not_fitted(
    points: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[range] = []

    def record(network: Any, spec: DenoiserSpec, seeds: range, **settings: Any) -> np.ndarray:
        drawn.append(seeds)
        return generate(network, spec, seeds, **settings)

    monkeypatch.setattr(f"{with_output_corrections.__module__}.generate", record)
    quantize(points, QuantizeConfig(samples=4, batch=4), Context(0, tmp_path, points))
    assert drawn == [range(OUTPUT_CORRECTION_SEED + 4, OUTPUT_CORRECTION_SEED + 8)] * 3


def _samples(model: nn.Module, checkpoint: Checkpoint, cond: ConditioningInputs) -> np.ndarray:
    return generate(TorchNetwork(model, checkpoint.spec), checkpoint.spec, range(32), batch=32, conditions=cond)
