"""runtime/benchmarking/step_kinds.py: full steps take the time of the network, forecasts do not."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np

from diffpress.runtime.benchmarking.step_kinds import step_cache_facts, step_cache_text
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork
from tests.runtime.fused_specs import spec_of

SECONDS = 0.01


class Slow(FakeNetwork):
    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        time.sleep(SECONDS)
        return super().run(inputs)


def cached(steps: tuple[str, ...]) -> DenoiserSpec:
    spec = spec_of("ddim", "v", len(steps))
    return spec.with_plan(replace(spec.plan, cache=StepCache("forecast", steps, 1)))


def test_each_kind_of_step_has_its_own_time() -> None:
    spec = cached(("full", "full", "forecast", "forecast", "forecast"))
    facts = step_cache_facts(Slow("v", spec.schedule), spec, batch=1)
    assert facts is not None and facts["counts"] == {"full": 2, "forecast": 3}
    assert facts["ms"]["full"] >= 0.9e3 * SECONDS and facts["ms"]["forecast"] < 0.5e3 * SECONDS
    assert step_cache_text({"counts": {"full": 2}, "ms": {"full": 3.214}}) == "2 full of 3.21 ms"


def test_a_plan_without_a_cache_has_no_kinds() -> None:
    spec = spec_of("ddim", "v")
    assert step_cache_facts(FakeNetwork("v", spec.schedule), spec, batch=1) is None
