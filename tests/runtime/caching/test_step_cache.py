"""runtime/caching/step_cache.py: a cache is plan data, and one that does not fit its plan is refused by name."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import required_features
from diffpress.runtime.caching.cacheable import is_cacheable
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.requested_plan import requested_spec
from diffpress.runtime.sampler import evaluated_levels, generate, network_evaluations, sample
from diffpress.runtime.sampling_plan import plan_from_json
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fused_specs import CLASSES, ONE_EVALUATION, spec_of

CACHE = StepCache("forecast", ("full", "full", "forecast", "forecast", "full", "forecast"), order=1)


def cached_spec(cache: StepCache = CACHE, solver: str = "dpmpp_2m", **plan: Any) -> DenoiserSpec:
    return spec_of(solver, "v", len(cache.steps), conditioning=CLASSES, cache=cache, **plan)


def test_a_cached_plan_survives_json_and_one_without_a_cache_keeps_its_form() -> None:
    plan = cached_spec().plan
    assert plan_from_json(json.loads(json.dumps(plan.to_json()))) == plan
    assert "cache" not in plan.without_cache.to_json()


def test_a_bundle_with_a_cached_plan_requires_a_runtime_that_knows_it() -> None:
    assert required_features(cached_spec(), ["denoiser"]) == ["step_cache"]
    assert required_features(spec_of("ddim"), ["denoiser"]) == []


def test_the_evaluations_of_a_plan_are_those_of_its_full_steps() -> None:
    spec = cached_spec(guidance=2.0)
    assert [level.t for level in evaluated_levels(spec)] == [spec.plan.timesteps[k] for k in (0, 1, 4)]
    assert network_evaluations(spec) == 6 and network_evaluations(spec.with_plan(spec.plan.without_cache)) == 12


def test_every_deterministic_solver_of_one_evaluation_may_have_a_cache_and_no_other() -> None:
    assert sorted(name for name in SOLVERS if is_cacheable(name)) == ONE_EVALUATION


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"kind": "teacache", "steps": ["full"]}, "kind 'teacache' is not one of forecast, features"),
        ({"kind": "forecast", "steps": ["full", "half"]}, "step 'half' is not one of full, forecast"),
        ({"kind": "forecast", "steps": ["forecast", "full"]}, "the first step must be 'full'"),
        ({"kind": "forecast", "steps": []}, "the first step must be 'full'"),
        ({"kind": "forecast", "steps": ["full"] * 6, "order": 3}, "order 3 is not one of 0, 1, 2"),
        ({"kind": "forecast", "steps": ["full"] * 5}, "5 entries for 6 timesteps"),
        ({"kind": "forecast", "steps": "full"}, "steps must be a list, found str"),
        ({"kind": "forecast"}, "the entry 'steps' is missing"),
        ({"kind": "forecast", "steps": ["full"] * 6, "period": 2}, "unknown entry 'period'"),
        ([], "expected a JSON object, found list"),
    ],
)
def test_a_cache_that_cannot_be_followed_is_refused_in_one_line(data: Any, message: str) -> None:
    plan = cached_spec().plan.to_json() | {"cache": data}
    with pytest.raises(InvalidInputError) as caught:
        plan_from_json(plan, "plan")
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("solver", "eta", "message"),
    [
        ("heun", 0.0, "solver 'heun' evaluates the network more than once in a step"),
        ("pndm", 0.0, "solver 'pndm' evaluates the network more than once in a step"),
        ("euler_ancestral", 0.0, "solver 'euler_ancestral' adds noise in every step"),
        ("ddim", 0.5, "solver 'ddim' with eta 0.5 adds noise in every step"),
    ],
)
def test_solvers_that_cannot_be_cached_are_refused_with_those_that_can(
    fake_network: type[FakeNetwork], solver: str, eta: float, message: str
) -> None:
    spec = cached_spec(solver=solver, eta=eta)
    network = fake_network("v", spec.schedule, labelled=True)
    for work in (lambda: generate(network, spec, range(2)), lambda: network_evaluations(spec)):
        with pytest.raises(InvalidInputError) as caught:
            work()
        assert message in str(caught.value) and "dpmpp_2m" in str(caught.value) and not network.calls


def test_a_distilled_network_has_no_cache() -> None:
    with pytest.raises(InvalidInputError, match=r"was distilled \(consistency\) for few steps"):
        replace(cached_spec(), distilled="consistency")


@pytest.mark.parametrize("changes", [{"steps": 5}, {"solver": "ddim"}, {"spacing": "karras"}])
def test_another_plan_drops_the_cache_and_says_so(changes: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    assert requested_spec(cached_spec(), **{"steps": None, **changes}).plan.cache is None
    assert "the step cache was measured for 6 steps of dpmpp_2m" in caplog.text


def test_as_many_other_timesteps_drop_the_cache() -> None:
    plan = cached_spec().plan
    assert plan.over(tuple(t - 1.0 for t in plan.timesteps)).cache is None and plan.over(plan.timesteps) == plan


def test_the_same_plan_and_another_guidance_keep_the_cache(caplog: pytest.LogCaptureFixture) -> None:
    assert requested_spec(cached_spec(), None).plan.cache == CACHE
    assert requested_spec(cached_spec(), 6, "dpmpp_2m", guidance=3.0).plan.cache == CACHE
    assert not caplog.text


def test_the_cache_can_be_switched_off(caplog: pytest.LogCaptureFixture) -> None:
    spec = cached_spec()
    assert requested_spec(spec, None, step_cache=False).plan == spec.plan.without_cache
    assert not caplog.text


def test_the_sampler_refuses_a_denoiser_that_would_ignore_the_cache() -> None:
    spec = cached_spec()

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        return x

    with pytest.raises(InvalidInputError, match="which this denoiser does not follow"):
        next(sample(denoise, np.zeros((1, *spec.sample_shape), np.float32), spec.schedule, spec.plan))
