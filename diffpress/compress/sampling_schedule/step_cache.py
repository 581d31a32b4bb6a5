"""Search for the steps that a plan evaluates: dynamic programming over the model's own trajectories, then measurement.

On the trajectories of the plan without a cache, let out_j be the network's output in step j, and f_j(S) its forecast
from the last full steps S (runtime/caching/forecast.py). A forecast moves the next sample by about

    error(S, j) = |d x' / d out| * mean over samples of rms(f_j(S) - out_j)        needs no further evaluations

since one step of first order is linear in out. With S' = S and one more full step n, of which the last order + 1 count,
the cost of E full steps is

    V_1(S) = sum of error(S, j) over all j after S
    V_e(S) = min_n  sum of error(S, j) over the j before n  +  gamma V_(e-1)(S')

gamma weights late errors, as in the search of timesteps (search.py). The pattern of each gamma and order is sampled
from the same noise, and the one with the lowest loss is kept and refined, by moving one full step at a time:

    loss in dB = 10 log10(sum (x_end - x_end without cache)^2 / sum (x_end without cache)^2)

The honest rival of a cache is the same solver with as many steps as the cache has full steps: it takes the same time.
If its samples are as near to those of the whole plan, nothing is gained, and the plan stays without a cache.

On the built-in teacher (dpmpp_2m, 20 steps, 8 trajectories) 11 full steps of order 2 gave -33.1 dB, 11 steps without a
cache -20.4 dB.

If the timesteps are searched as well, they are searched first, for the whole number of steps, and the pattern on them:
the patterns of every other set of timesteps would need trajectories of their own.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import numpy as np

from diffpress.compress.progress import progress
from diffpress.compress.sampling_schedule.config import StepCacheConfig
from diffpress.compress.sampling_schedule.search import GAMMAS, batches, final_samples
from diffpress.runtime.caching.forecast import forecast_time, forecast_weights
from diffpress.runtime.caching.step_cache import FORECAST, FULL, MAX_ORDER, StepCache
from diffpress.runtime.denoiser import denoiser_from_predictor, make_predictor, plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.parameterization import to_x0, transfer
from diffpress.runtime.sampling_plan import SamplingPlan, plan_steps
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

MAX_GAP = 8  # a full step and the forecasts after it, at most

Pattern = tuple[int, ...]  # indices of the full steps, ascending from 0
Errors = Callable[[Pattern, int], float]


@dataclass(frozen=True)
class Trajectories:
    """What the search needs of the trajectories without a cache.

    Attributes:
        products: Scalar products of the outputs of every two steps divided by their size, float64 [N, steps, steps].
        gains: |d x' / d out| of every step.
        times: Time of every step's forecast.
        ends: Final samples, float32 [N, ...].
    """

    products: np.ndarray
    gains: tuple[float, ...]
    times: tuple[float, ...]
    ends: np.ndarray

    def error(self, sources: Pattern, index: int) -> float:
        """Return the error of a forecast in step `index` from the last full steps `sources`, see above."""
        weights = forecast_weights([self.times[k] for k in sources], self.times[index])
        difference, chosen = np.array([*weights, -1.0]), [*sources, index]
        squares = np.einsum("i,nij,j->n", difference, self.products[:, chosen][:, :, chosen], difference)
        return self.gains[index] * float(np.sqrt(np.maximum(squares, 0.0)).mean())


def choose_step_cache(
    network: Network,
    spec: DenoiserSpec,
    config: StepCacheConfig,
    conditions: ConditioningInputs,
    rival: Callable[[int], SamplingPlan],
) -> tuple[StepCache | None, dict[str, Any]]:
    """Choose the step cache of the spec's plan; None if nothing is gained.

    Args:
        network: The network to sample.
        spec: Its spec, whose plan has no cache.
        config: Settings of the search.
        conditions: Conditioning of `config.samples` samples.
        rival: Returns the plan without a cache and with that many steps, see above.

    Returns:
        The cache, and the measured losses for the history.

    Raises:
        InvalidInputError: The samples without a cache are NaN or infinite.
    """
    plan, seen = spec.plan, dict[SamplingPlan, float]()
    trajectories = sampled_trajectories(network, spec, config, conditions)
    orders = range(MAX_ORDER + 1) if config.order is None else (config.order,)

    def loss_db(candidate: SamplingPlan) -> float:
        if candidate not in seen:
            seen[candidate] = _loss_db(network, spec.with_plan(candidate), trajectories.ends, config, conditions)
        return seen[candidate]

    patterns = {
        (order, gamma): best_patterns(trajectories.error, plan.steps, order, gamma)
        for order in orders
        for gamma in GAMMAS
    }

    @cache
    def best_of(full: int) -> SamplingPlan:
        candidates = {
            replace(plan, cache=cache_of(pattern[full], plan.steps, order))
            for (order, _), pattern in patterns.items()
            if full in pattern
        }
        return min(candidates, key=lambda candidate: (loss_db(candidate), str(candidate.cache)))

    full = _budget(config, plan.steps, min(min(pattern) for pattern in patterns.values()), best_of, loss_db)
    notes: dict[str, Any] = {"samples": config.samples, "steps": plan.steps}
    if full is None:
        nearest = loss_db(best_of(plan.steps - 1)) if plan.steps > 1 else 0.0
        wanted = f"max_error_db {config.max_error_db:g}" if config.speedup is None else f"speedup {config.speedup:g}"
        logger.warning(
            f"step cache: nothing is gained with {wanted}: without one of {plan.steps} steps the error is already "
            f"{nearest:.1f} dB; the plan stays without a cache"
        )
        return None, notes | {"loss_db": round(nearest, 2), "kept": False}
    best = refined(best_of(full), loss_db, config.refine)
    value, other = loss_db(best), loss_db(rival(full))
    found = best.cache
    assert found is not None
    notes |= {"loss_db": round(value, 2), "rival_loss_db": round(other, 2), **found.counts, "order": found.order}
    compared = f"{value:.1f} dB error with {full} of {plan.steps} steps evaluated (order {found.order}), {other:.1f} dB"
    if not value < other:
        logger.warning(
            f"step cache: nothing is gained: {compared} with a plan of {full} steps, which takes the same time; the "
            "plan stays without a cache"
        )
        return None, notes | {"kept": False}
    logger.info(f"step cache: {compared} with a plan of {full} steps")
    return found, notes | {"kept": True}


def _budget(
    config: StepCacheConfig,
    steps: int,
    least: int,
    best_of: Callable[[int], SamplingPlan],
    loss_db: Callable[[SamplingPlan], float],
) -> int | None:
    """Return the number of full steps, from `least` to one less than all: for a speedup, or the fewest for an error."""
    if config.speedup is not None:
        full = max(least, math.floor(steps / config.speedup + 1e-9))
        return full if full < steps else None
    assert config.max_error_db is not None
    low, high = least, steps  # the error falls with the number of full steps
    while low < high:
        middle = (low + high) // 2
        if loss_db(best_of(middle)) <= config.max_error_db:
            high = middle
        else:
            low = middle + 1
    return low if low < steps else None


def cache_of(pattern: Pattern, steps: int, order: int) -> StepCache:
    """Return the cache of a plan with these full steps."""
    return StepCache("forecast", tuple(FULL if k in pattern else FORECAST for k in range(steps)), order)


def best_patterns(error: Errors, steps: int, order: int, gamma: float) -> dict[int, Pattern]:
    """Return number of full steps -> the pattern of lowest cost with that many, by the recursion above.

    Numbers that would need more than MAX_GAP steps from one full step to the next are left out.
    """
    costs: dict[Pattern, np.ndarray] = {}
    choices: dict[Pattern, np.ndarray] = {}
    for last in reversed(range(steps)):
        for state in _states(last, order):
            # [e]: cost of e + 1 full steps from the last one of the state on
            best, choice = np.full(steps, np.inf), np.zeros(steps, np.int64)
            so_far = 0.0
            for following in range(last + 1, min(last + MAX_GAP, steps) + 1):
                if following == steps:
                    if so_far < best[0]:
                        best[0], choice[0] = so_far, steps
                    break
                cost = so_far + gamma * costs[(*state, following)[-(order + 1) :]][:-1]
                better = cost < best[1:]
                best[1:][better], choice[1:][better] = cost[better], following
                so_far += error(state, following)
            costs[state], choices[state] = best, choice
    found = {}
    for count in range(1, steps + 1):
        if np.isfinite(costs[0,][count - 1]):
            state, pattern = (0,), [0]
            for left in range(count - 1, 0, -1):
                following = int(choices[state][left])
                pattern.append(following)
                state = (*state, following)[-(order + 1) :]
            found[count] = tuple(pattern)
    return found


def _states(last: int, order: int) -> list[Pattern]:
    """Return every tuple of the last order + 1 full steps that ends with `last`; fewer only if it starts with 0."""
    found: list[Pattern] = [(last,)]
    complete: list[Pattern] = []
    for _ in range(order):
        complete += [state for state in found if state[0] == 0]
        found = [
            (before, *state) for state in found for before in range(max(0, state[0] - MAX_GAP), state[0]) if state[0]
        ]
    return [*complete, *(state for state in found if len(state) == order + 1)] if order else found


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
    """Return the plan with the full step `index` moved to the forecast `other`; None if they are not these."""
    assert plan.cache is not None
    steps = list(plan.cache.steps)
    if not 0 < other < len(steps) or (steps[index], steps[other]) != (FULL, FORECAST):
        return None
    steps[index], steps[other] = FORECAST, FULL
    return replace(plan, cache=replace(plan.cache, steps=tuple(steps)))


def sampled_trajectories(
    network: Network, spec: DenoiserSpec, config: StepCacheConfig, conditions: ConditioningInputs
) -> Trajectories:
    """Sample the plan without a cache, and record what the search needs.

    Raises:
        InvalidInputError: The samples are NaN or infinite.
    """
    plan, products, ends = spec.plan, [], []
    for part in batches(config.samples, config.batch, "step cache: trajectories"):
        predict = make_predictor(
            network,
            spec,
            conditions=conditions.part(part),
            guidance=plan.guidance,
            interval=plan.guidance_interval,
            rescale=plan.guidance_rescale,
        )
        outputs: list[np.ndarray] = []

        def recorded(
            x: np.ndarray, level: NoiseLevel, predict: Any = predict, outputs: list[np.ndarray] = outputs
        ) -> np.ndarray:
            outputs.append(predict(x, level))
            return outputs[-1]

        denoise = denoiser_from_predictor(recorded, spec, clip=plan.clip, threshold=plan.threshold)
        ends.append(final_samples(denoise, spec, plan, part))
        flat = np.stack(outputs).reshape(plan.steps, len(outputs[0]), -1).astype(np.float64)
        products.append(np.einsum("ind,jnd->nij", flat, flat) / flat.shape[-1])
    final = np.concatenate(ends)
    if not np.isfinite(final).all():
        raise InvalidInputError(
            "schedule: cache: the samples of the plan contain NaN or infinite values; the search cannot run"
        )
    levels = plan_steps(spec.schedule, plan)
    return Trajectories(
        np.concatenate(products),
        tuple(_gain(spec, now, after) for now, after in levels),
        tuple(forecast_time(now) for now, _ in levels),
        final,
    )


def _gain(spec: DenoiserSpec, now: NoiseLevel, after: NoiseLevel) -> float:
    """Return |d x' / d out| of a step of first order."""
    return abs(float(transfer(0.0, to_x0(spec.prediction, 0.0, 1.0, now), now, after)))


def _loss_db(
    network: Network,
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
