"""runtime/caching/features.py: cached steps evaluate the outer layers with the features of the last full step."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffpress.runtime.benchmarking.step_kinds import step_cache_facts
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import run_fused_of
from diffpress.runtime.sampler import generate, network_evaluations, warm_up
from diffpress.runtime.sampling_plan import plan_from_json
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fused_specs import CLASSES, spec_of

STEPS = ("full", "cached", "full", "cached", "cached")


class Split(FakeNetwork):
    """Its features are its output and its number of full evaluations; a cached evaluation returns that output."""

    def run_full(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        out = self.run(inputs)
        return out, out

    def run_cached(self, inputs: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
        assert len(features) == len(inputs["sample"])
        return features.copy()


def cached(steps: tuple[str, ...] = STEPS, guidance: float = 1.0) -> DenoiserSpec:
    spec = spec_of("dpmpp_2m", "v", len(steps), conditioning=CLASSES, guidance=guidance)
    return spec.with_plan(replace(spec.plan, cache=StepCache("features", steps, cut="up_blocks.1")))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_cached_step_reuses_the_features_of_the_last_full_step(guidance: float) -> None:
    """If the features are the whole output, cached steps are forecasts of order 0."""
    spec = cached(guidance=guidance)
    steps = tuple("forecast" if step == "cached" else step for step in STEPS)
    forecasts = replace(spec.plan, cache=StepCache("forecast", steps))
    network = Split("v", spec.schedule, labelled=True)
    found = generate(network, spec, range(5), batch=2)
    assert len(network.calls) == 3 * 2
    np.testing.assert_allclose(found, generate(network, spec, range(5), plan=forecasts, batch=2), rtol=0, atol=1e-5)


def test_cached_steps_count_as_evaluations_and_the_loop_runs_them() -> None:
    spec = cached(guidance=2.0)
    assert network_evaluations(spec) == 10
    network = Split("v", spec.schedule, labelled=True)
    assert run_fused_of(network, spec) is None
    warm_up(network, spec, 2)
    facts = step_cache_facts(network, spec, 1)
    assert facts is not None and facts["counts"] == {"full": 2, "cached": 3} and set(facts["ms"]) == {"full", "cached"}


def test_full_steps_alone_give_the_same_bits_in_any_network(fake_network: type[FakeNetwork]) -> None:
    spec = cached(("full",) * 5)
    network = fake_network("v", spec.schedule, labelled=True)
    assert np.array_equal(
        generate(network, spec, range(3)), generate(network, spec, range(3), plan=spec.plan.without_cache)
    )


def test_a_network_without_a_cached_graph_is_refused(fake_network: type[FakeNetwork]) -> None:
    spec = cached()
    network = fake_network("v", spec.schedule, labelled=True)
    for work in (lambda: generate(network, spec, range(2)), lambda: warm_up(network, spec, 2)):
        with pytest.raises(InvalidInputError, match="this network has no cached graph"):
            work()


def test_a_guidance_interval_is_refused() -> None:
    spec = cached(guidance=3.0)
    with pytest.raises(InvalidInputError, match="needs the same rows in every step"):
        replace(spec.plan, guidance_interval=(0.1, None))


@pytest.mark.parametrize(("kind", "cut"), [("features", ""), ("forecast", "up_blocks.1")])
def test_a_cut_belongs_to_features_alone(kind: str, cut: str) -> None:
    plan = cached(("full",) * 5).plan.to_json()
    plan["cache"] |= {"kind": kind, "cut": cut}
    with pytest.raises(InvalidInputError, match="kind 'features' needs a cut, and no other has one"):
        plan_from_json(plan, "plan")
