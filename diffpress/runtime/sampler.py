"""The sampler: one loop from noise to image that yields every step.

    x_N = noise;   x_0 = denoise(x, point);   x' = solver(x, x_0, point, next, ...);   until sigma = 0

Noise comes from one counter-based generator per sample (Philox, Salmon et al. 2011), keyed by that sample's
seed: an image depends on its seed, its label and the plan, and on nothing else in its batch. Stream 0 is the
starting noise, stream k the noise that step k adds where eta > 0 or the solver is a noisy one; a second noise in one
step is stream k + N.

A network that can walk by itself, without handing out every step, is given the whole of it where its numbers are known
ahead (diffpress.runtime.fused.program); whatever it cannot walk comes back to the loop.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from diffpress.runtime.denoiser import Denoise, plan_denoiser
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused.program import fused_program
from diffpress.runtime.guidance import evaluations_at
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    Network,
    class_conditioning,
    dummy_conditioning,
    dummy_inputs,
    static_inputs,
)
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, noise_level_at
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels
from diffpress.runtime.solvers import solver_named
from diffpress.runtime.solvers.contract import MAX_HISTORY, PreviousStep, StepState
from diffpress.runtime.spec import DenoiserSpec

MAX_SEED = 2**63 - 1

FusedSampling = Callable[[dict[str, np.ndarray], np.ndarray], np.ndarray | None]


class Step(NamedTuple):
    """One finished step: its number from 0, its timestep, the sample after it and the x_0 it used."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a step
    t: float
    x: np.ndarray
    x0: np.ndarray


def _no_noise(k: int) -> np.ndarray:
    raise InvalidInputError("a noisy solver, and any plan with eta above 0, adds noise at every step: pass fresh_noise")


def sample(
    denoise: Denoise,
    noise: np.ndarray,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    fresh_noise: Callable[[int], np.ndarray] = _no_noise,
) -> Iterator[Step]:
    """Walk the plan from unit `noise` (float32 [N, C, H, W]); the last step's x is the result.

    `denoise(x, level) -> x_0` is the model (it applies guidance and clipping), `fresh_noise(k)` gives unit
    noise like x for step k = 1, 2, ... (and for k + N where a step needs two) and is needed where plan.eta > 0 and by
    noisy solvers. Raises InvalidInputError for an unknown solver.
    """
    solver = solver_named(plan.solver)
    levels = plan_levels(schedule, plan.timesteps, plan.end)
    x = _started(noise, levels[0], plan)
    past: deque[PreviousStep] = deque(maxlen=MAX_HISTORY)
    for index, (now, after) in enumerate(itertools.pairwise(levels)):
        x0 = denoise(x, now)

        def fresh(k: int, stream: int = index + 1) -> np.ndarray:
            return fresh_noise(stream + k * plan.steps)

        step = StepState(x, x0, now, after, tuple(past), index, plan.steps, denoise, fresh, plan.eta, schedule)
        if solver.correct is not None:
            step = step._replace(x=solver.correct(step))
        x = solver.move(step)
        past.append(PreviousStep(now, step.x, x0))
        yield Step(index, now.t, x, x0)


def initial_std(level: NoiseLevel, start: str) -> float:
    """The standard deviation of the noise to start from; 'marginal' is that of noised data of unit variance."""
    return {"marginal": float(np.hypot(level.alpha, level.sigma)), "noise": level.sigma, "unit": 1.0}[start]


def _started(noise: np.ndarray, level: NoiseLevel, plan: SamplingPlan) -> np.ndarray:
    started: np.ndarray = np.float32(initial_std(level, plan.start)) * noise
    return started


def network_evaluations(spec: DenoiserSpec) -> int:
    """Network evaluations for one image by the spec's plan, both halves under guidance."""
    return sum(evaluations_at(spec, level) for level in evaluated_levels(spec))


def evaluated_levels(spec: DenoiserSpec) -> list[NoiseLevel]:
    """Where the spec's plan asks the network, call by call: found out on an empty batch."""
    levels: list[NoiseLevel] = []
    nothing = np.zeros((0, *spec.sample_shape), np.float32)

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        levels.append(level)
        return x

    deque(sample(denoise, nothing, spec.schedule, spec.plan, lambda k: nothing), maxlen=0)
    return levels


def noise_for(seeds: Sequence[int] | np.ndarray, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Unit normal noise, float32 [len(seeds), *shape]; one generator per seed (0 to 2^63 - 1) and stream."""
    noise = np.empty((len(seeds), *shape), np.float32)
    # the highest word of the 256-bit counter: no stream ever runs into the next
    _generator.start["state"]["counter"][3] = stream
    for row, seed in zip(noise, seeds, strict=True):
        if not 0 <= seed <= MAX_SEED:
            raise InvalidInputError(f"seed {seed}: must lie in 0..{MAX_SEED}")
        _generator.start["state"]["key"][0] = int(seed)
        _generator.philox.state = _generator.start
        _generator.normal(out=row, dtype=np.float32)
    return noise


class _Generator(threading.local):
    """One for each thread, set to a seed's state each time: a new one asks the system for entropy that it then drops,
    and with cold caches takes twice as long as the noise of a small image.
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
) -> np.ndarray:
    """Samples float32 [N, C, H, W], one per seed, made `batch` at a time (the last may be smaller): images in the data
    range, or latents for `diffpress.runtime.pipeline.decode`.

    `labels` are N class labels; None takes the classes in turn where the model has them. A model of text takes
    `conditions` instead (diffpress.runtime.pipeline). `plan` defaults to the spec's. Raises InvalidInputError where any of these do not
    fit.
    """
    return np.concatenate(list(generate_batches(network, spec, seeds, labels, plan, batch, conditions)))


def generate_batches(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    plan: SamplingPlan | None = None,
    batch: int = 8,
    conditions: ConditioningInputs | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the samples of one batch after the other."""
    if plan is not None:
        spec = spec.with_plan(plan)
    if batch < 1 or len(seeds) < 1:
        raise InvalidInputError(f"{len(seeds)} samples in batches of {batch}: both must be at least 1")
    if conditions is None:
        classes = labels_in_turn(spec, len(seeds)) if labels is None else np.asarray(labels)
        if classes is not None and classes.shape != (len(seeds),):
            raise InvalidInputError(f"{classes.size} labels for {len(seeds)} seeds: give one label per seed")
        conditions = class_conditioning(spec, classes)
    elif labels is not None:
        raise InvalidInputError("give labels or conditions, not both")
    counts = {len(array) for array in (*conditions.cond.values(), *(conditions.uncond or {}).values())}
    if not counts <= {len(seeds)}:
        raise InvalidInputError(f"conditions of {min(counts)} samples for {len(seeds)} seeds: give one each")
    # fused sampling does not return its steps, so a callback needs the loop
    run_fused = _fused_program_of(network, spec) if on_step is None else None
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        samples = _one_batch(network, spec, seeds[part], conditions.part(part), run_fused, on_step)
        yield np.clip(samples, *spec.data_range) if spec.plan.clip else samples


def warm_up(network: Network, spec: DenoiserSpec, batch: int) -> None:
    """One step of a batch of this size, for an engine that compiles what it is first asked to run."""
    if _fused_program_of(network, spec) is None:
        network.run(dummy_inputs(network, spec, batch))
        return
    first = spec.with_plan(spec.plan.over(spec.plan.timesteps[:1]))
    generate(network, first, range(batch), batch=batch, conditions=dummy_conditioning(spec, batch))


def labels_in_turn(spec: DenoiserSpec, count: int) -> np.ndarray | None:
    """0, 1, ... over the model's classes and round again, int64 [count]; None for a model without classes."""
    if spec.conditioning.kind != "class":
        return None
    return np.arange(count) % spec.conditioning.classes


def _fused_program_of(network: Network, spec: DenoiserSpec) -> FusedSampling | None:
    """The spec's plan as one call of the network, for a network that walks and a plan that it can."""
    run_fused = getattr(network, "run_fused", None)  # isinstance(network, Walker) takes as long as a step's arithmetic
    if run_fused is None or (program := fused_program(spec)) is None:
        return None
    return partial(run_fused, program)


def _one_batch(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    conditions: ConditioningInputs,
    run_fused: FusedSampling | None,
    on_step: Callable[[Step], None] | None = None,
) -> np.ndarray:
    plan = spec.plan
    denoise = plan_denoiser(network, spec, conditions)
    noise = noise_for(seeds, spec.sample_shape)
    if run_fused is not None:
        started = _started(noise, noise_level_at(spec.schedule, plan.timesteps[0]), plan)
        fused = run_fused(static_inputs(network, spec, conditions, len(seeds)), started)
        if fused is not None:
            return fused
    steps = sample(denoise, noise, spec.schedule, plan, lambda k: noise_for(seeds, spec.sample_shape, stream=k))
    for step in steps:
        if on_step is not None:
            on_step(step)
    return step.x
