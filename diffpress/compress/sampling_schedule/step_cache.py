"""Search for the steps that a plan evaluates in full: by their errors on trajectories, then by measurement.

The cost of a pattern of full steps is the sum of the errors of the others (step_errors.py), where a weight gamma for
late errors is tried as in the search of timesteps (search.py). The pattern of lowest cost (step_patterns.py) of each
gamma and order is sampled from the same noise, and the one with the lowest loss is kept and refined, by moving one full
step at a time:

    loss in dB = 10 log10(sum (x_end - x_end without cache)^2 / sum (x_end without cache)^2)

A cached step takes a fraction of a full one, which is measured in an engine; a forecast takes none. The honest rival of
a cache is the same solver with as many steps as take the same time. If its samples are as near to those of the whole
plan, nothing is gained, and the plan stays without a cache.

If the timesteps are searched as well, they are searched first, for the whole number of steps, and the pattern on them:
the patterns of every other set of timesteps would need trajectories of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from diffpress.compress.progress import progress
from diffpress.compress.sampling_schedule.config import StepCacheConfig
from diffpress.compress.sampling_schedule.search import GAMMAS, batches, final_samples
from diffpress.compress.sampling_schedule.step_errors import Trajectories, sampled_trajectories
from diffpress.compress.sampling_schedule.step_patterns import Errors, Pattern, best_patterns
from diffpress.runtime.caching.step_cache import CACHED, FORECAST, FULL, MAX_ORDER, StepCache
from diffpress.runtime.denoiser import plan_denoiser
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


class Method(NamedTuple):
    """A way to leave evaluations out: its kind, and what a step that is not full costs in evaluations."""

    kind: str
    step_cost: float
    error: Errors
    orders: tuple[int, ...]
    cut: str = ""

    def cache_of(self, pattern: Pattern, steps: int, order: int) -> StepCache:
        """Return the cache of a plan with these full steps."""
        other = CACHED if self.kind == "features" else FORECAST
        return StepCache(self.kind, tuple(FULL if k in pattern else other for k in range(steps)), order, self.cut)

    def time(self, full: int, steps: int) -> float:
        """Return the time of a plan with that many full steps, in evaluations."""
        return full + (steps - full) * self.step_cost

    def full_steps(self, speedup: float, steps: int) -> int:
        """Return the largest number of full steps with which a plan is that much faster."""
        return math.floor(steps * (1.0 / speedup - self.step_cost) / (1.0 - self.step_cost) + 1e-9)


class Found(NamedTuple):
    """The best plan of a method, its loss, and its time in evaluations."""

    plan: SamplingPlan
    loss_db: float
    time: float


def choose_step_cache(
    network: Any,
    spec: DenoiserSpec,
    config: StepCacheConfig,
    conditions: ConditioningInputs,
    rival: Callable[[int], SamplingPlan],
    *,
    cut: str = "",
    cached_cost: float = 1.0,
) -> tuple[StepCache | None, dict[str, Any]]:
    """Choose the step cache of the spec's plan; None if nothing is gained.

    Args:
        network: The network to sample; for kinds 'features' and 'auto' one that evaluates its outer layers alone.
        spec: Its spec, whose plan has no cache.
        config: Settings of the search.
        conditions: Conditioning of `config.samples` samples.
        rival: Returns the plan without a cache and with that many steps, see above.
        cut: The cut of `network`, for the kinds that reuse features.
        cached_cost: Time of a cached evaluation divided by that of a full one.

    Returns:
        The cache, and the measured losses for the history.

    Raises:
        InvalidInputError: The samples without a cache are NaN or infinite.
    """
    steps = spec.plan.steps
    trajectories = sampled_trajectories(network, spec, config, conditions, reuses=config.kind != "forecast")
    methods = _methods(config, trajectories, cut, cached_cost)

    @cache
    def loss_db(candidate: SamplingPlan) -> float:
        return _loss_db(network, spec.with_plan(candidate), trajectories.ends, config, conditions)

    results = [_search(method, spec.plan, config, loss_db) for method in methods]
    found = [result for result in results if isinstance(result, Found)]
    notes: dict[str, Any] = {"samples": config.samples, "steps": steps}
    if any(method.kind == "features" for method in methods):
        notes["cached_cost"] = round(cached_cost, 3)
    if not found:
        reasons = [str(result) for result in results]
        logger.warning(f"step cache: nothing is gained: {'; '.join(reasons)}; the plan stays without a cache")
        return None, notes | {"kept": False, "reasons": reasons}
    # at equal time the smaller error counts, within an error the shorter time
    best = min(found, key=lambda one: one.loss_db if config.speedup is not None else one.time)
    chosen = best.plan.cache
    assert chosen is not None
    rival_steps = max(1, math.ceil(best.time - 1e-9))  # never less time than the cache has
    other = loss_db(rival(rival_steps))
    notes |= {"loss_db": round(best.loss_db, 2), "rival_loss_db": round(other, 2), **chosen.counts, "kind": chosen.kind}
    notes |= {"order": chosen.order, "cut": chosen.cut, "compared": _losses(found)}
    counts = ", ".join(f"{count} {kind}" for kind, count in chosen.counts.items())
    compared = f"{best.loss_db:.1f} dB error with {counts} of {steps} steps ({_how(chosen)}), {other:.1f} dB"
    if not best.loss_db < other:
        logger.warning(
            f"step cache: nothing is gained: {compared} with a plan of {rival_steps} steps, which takes the same time; "
            "the plan stays without a cache"
        )
        return None, notes | {"kept": False}
    logger.info(f"step cache: {compared} with a plan of {rival_steps} steps")
    return chosen, notes | {"kept": True}


def _losses(found: list[Found]) -> dict[str, float]:
    """Return kind -> loss in dB of its best plan."""
    return {one.plan.cache.kind: round(one.loss_db, 2) for one in found if one.plan.cache is not None}


def _how(chosen: StepCache) -> str:
    return f"cut {chosen.cut}" if chosen.kind == "features" else f"order {chosen.order}"


def _methods(config: StepCacheConfig, trajectories: Trajectories, cut: str, cached_cost: float) -> list[Method]:
    """Return the methods that the config compares."""
    orders = tuple(range(MAX_ORDER + 1)) if config.order is None else (config.order,)
    forecast = Method("forecast", 0.0, trajectories.forecast_error, orders)
    features = Method("features", cached_cost, trajectories.reuse_error, (0,), cut)
    return {"forecast": [forecast], "features": [features], "auto": [forecast, features]}[config.kind]


def _search(
    method: Method, plan: SamplingPlan, config: StepCacheConfig, loss_db: Callable[[SamplingPlan], float]
) -> Found | str:
    """Return the best plan of a method for the config's speedup or error, or why it has none."""
    steps = plan.steps
    if method.step_cost >= 1.0:
        return f"a cached step takes {method.step_cost:.2f} of a full one (cut {method.cut})"
    patterns = {
        (order, gamma): best_patterns(method.error, steps, order, gamma) for order in method.orders for gamma in GAMMAS
    }
    least = min(min(pattern) for pattern in patterns.values())

    @cache
    def best_of(full: int) -> SamplingPlan:
        caches = {
            method.cache_of(pattern[full], steps, order) for (order, _), pattern in patterns.items() if full in pattern
        }
        plans = [replace(plan, cache=one) for one in sorted(caches, key=str)]
        return min(plans, key=loss_db)

    if config.speedup is not None:
        full = method.full_steps(config.speedup, steps)
        if full < 1 and method.kind == "features":
            return (
                f"speedup {config.speedup:g} is more than cut {method.cut} can give, with which a cached step takes "
                f"{method.step_cost:.2f} of a full one"
            )
        full = max(full, least)
        if full >= steps:
            return f"{_one_less(best_of, steps, loss_db)}, and speedup {config.speedup:g} leaves out none"
    else:
        assert config.max_error_db is not None
        full = _fewest(least, steps, lambda count: loss_db(best_of(count)) <= float(config.max_error_db or 0.0))
        if full >= steps:
            return f"{_one_less(best_of, steps, loss_db)}, and max_error_db is {config.max_error_db:g}"
    best = refined(best_of(full), loss_db, config.refine)
    return Found(best, loss_db(best), method.time(full, steps))


def _one_less(best_of: Callable[[int], SamplingPlan], steps: int, loss_db: Callable[[SamplingPlan], float]) -> str:
    """Return in words the error of a plan without one of its full evaluations."""
    if steps < 2:
        return "a plan of one step has no earlier one"
    return f"without one of {steps} evaluations the error is {loss_db(best_of(steps - 1)):.1f} dB"


def _fewest(low: int, high: int, suffices: Callable[[int], bool]) -> int:
    """Return the smallest number from `low` that suffices; `high` if none below it does."""
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if suffices(middle) else (middle + 1, high)
    return low


def refined(
    plan: SamplingPlan, loss_db: Callable[[SamplingPlan], float], rounds: int, what: str = "step cache: refine"
) -> SamplingPlan:
    """Return a plan whose loss is not above that of `plan`, after `rounds` of moving each full step by one."""
    best = plan
    with progress(what, rounds) as advance:
        for done in range(1, rounds + 1):
            before = best
            for index in range(1, plan.steps):
                for other in (index - 1, index + 1):
                    moved = _swapped(best, index, other)
                    if moved is not None and loss_db(moved) < loss_db(best):
                        best = moved
            advance(done, f"{loss_db(best):.2f} dB")
            if best == before:
                break
    return best


def _swapped(plan: SamplingPlan, index: int, other: int) -> SamplingPlan | None:
    """Return the plan with the full step `index` moved to `other`, which is not full; None if they are not these."""
    assert plan.cache is not None
    steps = list(plan.cache.steps)
    if not 0 < other < len(steps) or steps[index] != FULL or steps[other] == FULL:
        return None
    steps[index], steps[other] = steps[other], steps[index]
    return replace(plan, cache=replace(plan.cache, steps=tuple(steps)))


def _loss_db(
    network: Any,
    spec: DenoiserSpec,
    ends: np.ndarray,
    config: StepCacheConfig,
    conditions: ConditioningInputs,
) -> float:
    """Return the loss of the spec's plan against the final samples `ends` [N, ...]; infinite if it is not finite."""
    total = 0.0
    for part in batches(len(ends), config.batch):
        denoise = plan_denoiser(network, spec, conditions.part(part))
        total += float(np.square(final_samples(denoise, spec, spec.plan, part) - ends[part], dtype=np.float64).sum())
    ratio = total / float(np.square(ends, dtype=np.float64).sum())
    return 10.0 * math.log10(max(ratio, 1e-30)) if math.isfinite(ratio) else math.inf
