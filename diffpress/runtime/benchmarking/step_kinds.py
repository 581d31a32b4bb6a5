"""Time of each kind of step in a plan with a step cache.

    ms(kind) = (time of a full step and n steps of the kind - time of the full step) / n

over the plan's first n + 1 timesteps, n at most REPEATED. A step includes the solver.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from functools import partial
from typing import Any

from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.caching.step_cache import FULL
from diffpress.runtime.network_inputs import Network, dummy_conditioning
from diffpress.runtime.sampler import generate, warm_up
from diffpress.runtime.spec import DenoiserSpec

REPEATED = 8
MIN_ROUNDS = 3


def step_cache_facts(network: Network, spec: DenoiserSpec, batch: int, repeats: int = 3) -> dict[str, Any] | None:
    """Return what the plan's steps evaluate, {"counts": {kind: steps}, "ms": {kind: median}}.

    None without a cache, or with a single step.
    """
    plan, cache = spec.plan, spec.plan.cache
    if cache is None or plan.steps < 2:
        return None
    kinds, repeated = list(cache.counts), min(REPEATED, plan.steps - 1)

    def sampling(*steps: str) -> partial[Any]:
        cut = replace(plan.over(plan.timesteps[: len(steps)]), cache=replace(cache, steps=steps))
        conditions = dummy_conditioning(spec, batch)
        return partial(generate, network, spec.with_plan(cut), range(batch), batch=batch, conditions=conditions)

    works = [sampling(FULL), *(sampling(FULL, *[kind] * repeated) for kind in kinds)]
    warm_up(network, spec, batch)
    for work in works:
        work()
    one, *others = (statistics.median(times) for times in alternating_times_ms(works, max(repeats, MIN_ROUNDS)))
    ms = {kind: max(0.0, total - one) / repeated for kind, total in zip(kinds, others, strict=True)}
    return {"counts": cache.counts, "ms": ms}


def step_cache_text(facts: dict[str, Any]) -> str:
    """Return the facts in words: '11 full of 3.21 ms, 9 forecast of 0.02 ms'."""
    return ", ".join(f"{count} {kind} of {facts['ms'][kind]:.2f} ms" for kind, count in facts["counts"].items())
