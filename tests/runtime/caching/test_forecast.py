"""runtime/caching/forecast.py: polynomials in the plan's time are forecast exactly, and full steps are untouched."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.caching.forecast import Forecasting, forecast_time
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.fused import fused_only, step_by_step
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel, noise_level_at
from diffpress.runtime.sampler import generate
from diffpress.runtime.sampling_plan import OutputCorrection, plan_steps
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fused_specs import CLASSES, ONE_EVALUATION, spec_of

STEPS = ("full", "full", "full", "forecast", "forecast", "full", "forecast", "full", "forecast")


def levels_of(spec: DenoiserSpec) -> list[NoiseLevel]:
    return [level for level, _ in plan_steps(spec.schedule, spec.plan)]


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_forecast_of_order_n_is_exact_for_a_polynomial_of_degree_n(order: int) -> None:
    levels = levels_of(spec_of("ddim", steps=len(STEPS)))
    coefficients = np.random.default_rng(order).standard_normal((order + 2, 2, 3))
    evaluated: list[float] = []

    def polynomial(degree: int, level: NoiseLevel) -> np.ndarray:
        powers = np.array([forecast_time(level) ** k for k in range(degree + 1)])
        return np.tensordot(powers, coefficients[: degree + 1], 1)

    def forecast_errors(degree: int) -> float:
        def network(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
            evaluated.append(level.t)
            return polynomial(degree, level)

        forecasting = Forecasting(network, StepCache("forecast", STEPS, order), levels)
        return max(float(np.abs(forecasting(np.zeros(0), lv) - polynomial(degree, lv)).max()) for lv in levels)

    assert forecast_errors(order) < 1e-5 and evaluated == [
        lv.t for lv, s in zip(levels, STEPS, strict=True) if s == "full"
    ]
    assert forecast_errors(order + 1) > 1e-2  # one degree more is not exact


def test_the_time_is_finite_and_rises_from_pure_noise_to_clean_data() -> None:
    spec = spec_of("ddim", "flow")
    ends = [NoiseLevel(1000.0, 0.0, 1.0), *(noise_level_at(spec.schedule, t) for t in (990, 500, 1)), CLEAN]
    times = [forecast_time(level) for level in ends]
    assert np.isfinite(times).all() and (np.diff(times) > 0).all()


def test_a_new_batch_starts_over() -> None:
    levels = levels_of(spec_of("ddim", steps=3))
    cache = StepCache("forecast", ("full", "full", "forecast"), order=2)
    forecasting = Forecasting(lambda x, level: x, cache, levels)
    first = [forecasting(np.full((1, 2), k + 1.0), level) for k, level in enumerate(levels)]
    again = [forecasting(np.full((1, 2), k + 1.0), level) for k, level in enumerate(levels)]
    assert np.array_equal(first, again) and first[2][0, 0] > 2.0


@pytest.mark.parametrize("solver", ONE_EVALUATION)
def test_a_plan_whose_steps_are_all_full_gives_the_same_bits(fake_network: type[FakeNetwork], solver: str) -> None:
    spec = spec_of(solver, "v")
    network = fake_network("v", spec.schedule)
    full = replace(spec.plan, cache=StepCache("forecast", ("full",) * 9, order=2))
    assert np.array_equal(generate(network, spec, range(3), plan=full), generate(network, spec, range(3)))


def test_the_network_runs_in_full_steps_only_and_once_for_both_guidance_halves(fake_network: type[FakeNetwork]) -> None:
    spec = spec_of("unipc_2", "v", conditioning=CLASSES, guidance=3.0, cache=StepCache("forecast", STEPS, 1))
    network = fake_network("v", spec.schedule, labelled=True)
    samples = generate(network, spec, range(4), batch=2)
    assert len(network.calls) == 2 * 5 and all(len(call["sample"]) == 4 for call in network.calls)
    uncached = generate(network, spec, range(4), plan=spec.plan.without_cache)
    assert 1e-3 < np.abs(samples - uncached).max() < 1.0


def test_batches_do_not_share_outputs(fake_network: type[FakeNetwork]) -> None:
    spec = spec_of("dpmpp_2m", "v", cache=StepCache("forecast", STEPS, 2))
    network = fake_network("v", spec.schedule)
    together, apart = (generate(network, spec, range(5), batch=batch) for batch in (5, 2))
    np.testing.assert_allclose(together, apart, rtol=0, atol=1e-6)


def test_a_forecast_is_corrected_like_an_output(fake_network: type[FakeNetwork]) -> None:
    """A correction by a factor alone commutes with the weighted sum if all steps have the same one."""
    cache = StepCache("forecast", STEPS, 1)
    spec = spec_of("ddim", "epsilon", clip=False, cache=cache)
    network = fake_network("epsilon", spec.schedule, oracle=lambda x, level: 0.3 * x)
    corrected = replace(spec.plan, output_corrections=(OutputCorrection(0.25, (0.0, 0.0)),) * 9)

    class Scaled:
        inputs = network.inputs

        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            return network.run(inputs) / np.float32(1.25)

    expected = generate(Scaled(), spec, range(2))
    np.testing.assert_allclose(generate(network, spec, range(2), plan=corrected), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("order", [0, 1, 2])
def test_a_bundles_cached_samples_agree_in_all_engines(
    tiny: Path, fake_network: type[FakeNetwork], order: int, noise: Callable[..., np.ndarray]
) -> None:
    bundle = load_bundle(tiny)
    steps = tuple("full" if k % 2 == 0 else "forecast" for k in range(bundle.spec.plan.steps))
    spec = bundle.spec.with_plan(replace(bundle.spec.plan, cache=StepCache("forecast", steps, order)))
    found = {}
    for name in available():
        with closing(open_engine(bundle, name, threads=1)) as engine:
            found[name] = generate(step_by_step(engine), spec, range(4))
            if name == "openvino":
                found["fused"] = generate(fused_only(engine), spec, range(4))
            uncached = generate(engine, spec, range(4), plan=spec.plan.without_cache)
    first = found.pop("onnxruntime")
    assert np.abs(first - uncached).max() > 1e-4
    for samples in found.values():
        np.testing.assert_allclose(samples, first, rtol=0, atol=1e-5)
