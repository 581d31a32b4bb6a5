"""compress/quantization/algorithms/output_correction.py: a known slope and bias are recovered and corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.output_correction import (
    fit_correction,
    measure_corrections,
    moments,
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
from diffpress.runtime.sampling_plan import make_plan
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
    out_q = 1.1 * out + draws.standard_normal((5, 3, 4, 4))
    columns = [out_q.transpose(1, 0, 2, 3).ravel(), *np.repeat(np.eye(3), 5 * 16, axis=1)]
    gain, *offset = np.linalg.lstsq(np.stack(columns, 1), out.transpose(1, 0, 2, 3).ravel(), rcond=None)[0]
    fit = fit_correction(moments(out[:2], out_q[:2]) + moments(out[2:], out_q[2:]), 1.0)
    nearest = gain * out_q + np.asarray(offset)[:, None, None]
    np.testing.assert_allclose(corrected(out_q, fit), nearest, atol=1e-6)


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
    config: dict[str, Any] = {"samples": 8, "batch": 8, "calibration": {"percentile": 90.0}}
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


def _samples(model: nn.Module, checkpoint: Checkpoint, cond: ConditioningInputs) -> np.ndarray:
    return generate(TorchNetwork(model, checkpoint.spec), checkpoint.spec, range(32), batch=32, conditions=cond)
