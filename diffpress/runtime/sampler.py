"""The sampler: one loop from noise to image that yields every step.

    x_N = noise;   x_0 = denoise(x, level);   x' = solver(x, x_0, level, next level, ...);   until the plan's end

Noise comes from one counter-based generator per sample (Philox, Salmon et al. 2011), keyed by the sample's seed, so
that an image depends on its seed, its conditioning and the plan, but not on the rest of its batch. Stream 0 is the
initial noise, stream k the noise that step k adds if eta > 0 or the solver is stochastic; a second noise in the same
step is stream k + N.

An engine that supports fused sampling runs the whole plan in one call if its coefficients are known in advance
(diffpress.runtime.fused); otherwise the Python loop runs it.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple, cast

import numpy as np

from diffpress.runtime.caching.cacheable import check_cacheable
from diffpress.runtime.caching.features import SplitNetwork, check_split
from diffpress.runtime.caching.step_cache import FORECAST, FULL, StepCache
from diffpress.runtime.denoiser import CachedDenoiser, Denoise, plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import RunFused, run_fused_of
from diffpress.runtime.guidance import evaluations_at
from diffpress.runtime.image_inputs.start import ImageStart
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    Network,
    class_conditioning,
    dummy_conditioning,
    dummy_inputs,
    static_inputs,
)
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.sampling_plan import SamplingPlan, plan_steps
from diffpress.runtime.solvers import get_solver
from diffpress.runtime.solvers.contract import MAX_HISTORY, PreviousStep, StepState
from diffpress.runtime.spec import DenoiserSpec

MAX_SEED = 2**63 - 1


class Step(NamedTuple):
    """A finished step: its index, its timestep, the sample after it and the x_0 it used.

    Examples:
        >>> import diffpress as dp
        >>> timesteps = []
        >>> def note(step: dp.Step) -> None:
        ...     timesteps.append(step.t)
        >>> with dp.Pipeline(bundle) as pipe:
        ...     images = pipe(seeds=0, steps=2, callback=note)
        >>> timesteps
        [49.0, 24.0]
    """

    index: int  # type: ignore[assignment]  # hides tuple.index, which is not used
    t: float
    x: np.ndarray
    x0: np.ndarray


def _no_noise(k: int) -> np.ndarray:
    raise InvalidInputError(
        "a stochastic solver, or a plan with eta above 0, adds noise in every step: pass fresh_noise"
    )


def sample(
    denoise: Denoise,
    noise: np.ndarray,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    fresh_noise: Callable[[int], np.ndarray] = _no_noise,
    image: ImageStart | None = None,
) -> Iterator[Step]:
    """Sample with a plan and yield every step; the x of the last step is the result.

    Args:
        denoise: The model, (x, level) -> x_0, including guidance and clipping. For a plan with a step cache it is made
            by `plan_denoiser`.
        noise: Unit noise to start from, float32 [N, ...].
        schedule: Noise schedule.
        plan: Sampling plan.
        fresh_noise: Returns unit noise shaped like x for step k = 1, 2, ..., and for k + N if a step needs a second
            one. Required by stochastic solvers and if plan.eta > 0.
        image: Start from these images, with the steps of the plan from `image.first` on.

    Raises:
        InvalidInputError: Unknown solver, `fresh_noise` is missing, or `denoise` does not follow the plan's cache.
    """
    solver = get_solver(plan.solver)
    if plan.cache is not None:
        check_cacheable(plan.solver, plan.eta, "plan: cache")
    if plan.cache is not None and not (isinstance(denoise, CachedDenoiser) and denoise.cache == plan.cache):
        raise InvalidInputError(
            "the plan has a step cache, which this denoiser does not follow: make it with plan_denoiser, or sample "
            "plan.without_cache"
        )
    levels = plan_steps(schedule, plan)
    first = 0 if image is None else image.first
    if image is None or image.from_noise:
        x = _started(noise, levels[first][0], plan)
    else:
        x = image.noised(noise, levels[first][0])
    history: deque[PreviousStep] = deque(maxlen=MAX_HISTORY)
    for index, (now, after) in enumerate(levels[first:], first):
        x0 = denoise(x, now)

        def fresh(k: int, stream: int = index + 1) -> np.ndarray:
            return fresh_noise(stream + k * plan.steps)

        step = StepState(x, x0, now, after, tuple(history), index, plan.steps, denoise, fresh, plan.eta, schedule)
        if solver.correct is not None:
            step = step._replace(x=solver.correct(step))
        x = solver.move(step)
        history.append(PreviousStep(now, step.x, x0))
        if image is not None:
            x = image.repainted(x, noise, None if step.is_last else levels[index + 1][0])
        yield Step(index, now.t, x, x0)


def initial_std(level: NoiseLevel, start: str) -> float:
    """Return the standard deviation of the initial noise; 'marginal' is that of noised data of unit variance."""
    return {"marginal": float(np.hypot(level.alpha, level.sigma)), "noise": level.sigma, "unit": 1.0}[start]


def _started(noise: np.ndarray, level: NoiseLevel, plan: SamplingPlan) -> np.ndarray:
    started: np.ndarray = np.float32(initial_std(level, plan.start)) * noise
    return started


def network_evaluations(spec: DenoiserSpec) -> int:
    """Return the network evaluations (NFE) for one image under the spec's plan; guidance counts both halves."""
    return sum(evaluations_at(spec, level) for level in evaluated_levels(spec))


def evaluated_levels(spec: DenoiserSpec, first: int = 0) -> list[NoiseLevel]:
    """Return the noise levels at which the spec's plan evaluates the denoiser, in order, by sampling an empty batch.

    `first` is the first step that is run.

    Raises:
        InvalidInputError: The plan's solver cannot have its step cache.
    """
    cache = spec.plan.cache
    if cache is not None:
        check_cacheable(spec.plan.solver, spec.plan.eta, "plan: cache")
    levels: list[NoiseLevel] = []
    empty = np.zeros((0, *spec.sample_shape), np.float32)

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        levels.append(level)
        return x

    start = ImageStart(empty, None, first)
    deque(sample(denoise, empty, spec.schedule, spec.plan.without_cache, lambda k: empty, start), maxlen=0)
    if cache is None:
        return levels
    return [level for level, step in zip(levels, cache.steps, strict=True) if step != FORECAST]


def noise_for(seeds: Sequence[int] | np.ndarray, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Return unit normal noise, float32 [len(seeds), *shape], one generator per seed (0 to 2^63 - 1) and stream."""
    noise = np.empty((len(seeds), *shape), np.float32)
    # the highest word of the 256-bit counter, so that streams never overlap
    _generator.start["state"]["counter"][3] = stream
    for row, seed in zip(noise, seeds, strict=True):
        if not 0 <= seed <= MAX_SEED:
            raise InvalidInputError(f"seed {seed}: must be in 0..{MAX_SEED}")
        _generator.start["state"]["key"][0] = int(seed)
        _generator.philox.state = _generator.start
        _generator.normal(out=row, dtype=np.float32)
    return noise


class _Generator(threading.local):
    """One generator per thread, reset to a seed's state for each sample.

    Creating one per sample would read unused entropy from the system and, with cold caches, take twice as long as
    drawing the noise of a small image.
    """

    def __init__(self) -> None:
        self.philox = np.random.Philox(key=0)
        self.start, self.normal = self.philox.state, np.random.Generator(self.philox).standard_normal


_generator = _Generator()


def generate(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    plan: SamplingPlan | None = None,
    batch: int = 8,
    conditions: ConditioningInputs | None = None,
    image: ImageStart | None = None,
) -> np.ndarray:
    """Return samples float32 [N, ...], one per seed: images or other data in the data range, or latents.

    `diffpress.runtime.pipeline.Pipeline.decode` turns latents into images.

    Args:
        network: The denoiser network.
        spec: Its spec.
        seeds: N seeds.
        labels: N class labels; None takes the classes of a class-conditional model in turn.
        plan: Sampling plan; defaults to the spec's.
        batch: Batch size; the last batch may be smaller.
        conditions: Conditioning of the N samples instead of labels, for models conditioned on text or tensors.
        image: Images that the N samples start from.

    Raises:
        InvalidInputError: The arguments do not fit the model or each other.
    """
    return np.concatenate(list(generate_batches(network, spec, seeds, labels, plan, batch, conditions, image=image)))


def generate_batches(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    plan: SamplingPlan | None = None,
    batch: int = 8,
    conditions: ConditioningInputs | None = None,
    on_step: Callable[[Step], None] | None = None,
    image: ImageStart | None = None,
) -> Iterator[np.ndarray]:
    """Yield the samples of `generate` batch by batch.

    `on_step` is called with every finished step of every batch. It disables fused sampling, as images do.
    """
    if plan is not None:
        spec = spec.with_plan(plan)
    if batch < 1 or len(seeds) < 1:
        raise InvalidInputError(f"{len(seeds)} samples in batches of {batch}: both must be at least 1")
    if conditions is None:
        classes = cycled_labels(spec, len(seeds)) if labels is None else np.asarray(labels)
        if classes is not None and classes.shape != (len(seeds),):
            raise InvalidInputError(f"{classes.size} labels for {len(seeds)} seeds: give one label per seed")
        conditions = class_conditioning(spec, classes)
    elif labels is not None:
        raise InvalidInputError("give labels or conditions, not both")
    counts = {len(array) for array in (*conditions.cond.values(), *(conditions.uncond or {}).values())}
    if not counts <= {len(seeds)}:
        raise InvalidInputError(f"conditions of {min(counts)} samples for {len(seeds)} seeds: give one per seed")
    # fused sampling does not return its steps, and runs the whole plan from noise
    fuses = on_step is None and image is None and conditions.control is None
    run_fused = run_fused_of(network, spec) if fuses else None
    for start in range(0, len(seeds), batch):
        members = slice(start, start + batch)
        part = None if image is None else image.part(members)
        samples = _one_batch(network, spec, seeds[members], conditions.part(members), run_fused, on_step, part)
        yield np.clip(samples, *spec.data_range) if spec.plan.clip else samples


def warm_up(network: Network, spec: DenoiserSpec, batch: int) -> None:
    """Run one step with a batch of this size, for engines that compile on the first run."""
    cache = spec.plan.cache
    if run_fused_of(network, spec) is None:
        inputs = dummy_inputs(network, spec, batch)
        network.run(inputs)
        if cache is not None and cache.kind == "features":
            check_split(network)
            split = cast(SplitNetwork, network)
            split.run_cached(inputs, split.run_full(inputs)[1])
        return
    plan = spec.plan.over(spec.plan.timesteps[:1])
    if cache is not None and not cache.is_idle:  # such plans may run another compiled graph
        plan = replace(spec.plan.over(spec.plan.timesteps[:2]), cache=StepCache("forecast", (FULL, FORECAST)))
    generate(network, spec.with_plan(plan), range(batch), batch=batch, conditions=dummy_conditioning(spec, batch))


def cycled_labels(spec: DenoiserSpec, count: int) -> np.ndarray | None:
    """Return the model's classes 0, 1, ... in turn, int64 [count]; None for a model without classes."""
    if spec.conditioning.kind != "class":
        return None
    return np.arange(count) % spec.conditioning.classes


def _one_batch(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    conditions: ConditioningInputs,
    run_fused: RunFused | None,
    on_step: Callable[[Step], None] | None = None,
    image: ImageStart | None = None,
) -> np.ndarray:
    plan = spec.plan

    def stream(k: int) -> np.ndarray:
        return noise_for(seeds, spec.sample_shape, stream=k)

    if image is not None:
        image, conditions = image.drawn(stream), image.conditioned(conditions, stream)
    if conditions.control is not None:
        evaluations = len(evaluated_levels(spec, 0 if image is None else image.first))
        network = conditions.control.attached(network, evaluations)
    denoise = plan_denoiser(network, spec, conditions)
    noise = stream(0)
    if run_fused is not None:
        started = _started(noise, plan_steps(spec.schedule, plan)[0][0], plan)
        fused = run_fused(static_inputs(network, spec, conditions, len(seeds)), started)
        if fused is not None:
            return fused
    for step in sample(denoise, noise, spec.schedule, plan, stream, image):
        if on_step is not None:
            on_step(step)
    return step.x
