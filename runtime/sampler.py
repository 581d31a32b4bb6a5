"""The sampler: one loop from noise to image that yields every step.

    x_N = noise;   x_0 = denoise(x, point);   x' = solver(x, x_0, point, next, ...);   until sigma = 0

Noise comes from one counter-based generator per sample (Philox, Salmon et al. 2011), keyed by that sample's
seed: an image depends on its seed, its label and the plan, and on nothing else in its batch. Stream 0 is the
starting noise, stream k the noise that step k adds where eta > 0 or the solver is lcm.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np

from runtime.denoise import Conditions, Denoise, Network, class_conditions, make_denoiser
from runtime.errors import BadInput
from runtime.schedule import trajectory
from runtime.solvers import MEMORY, WARM_UP, Past, solver_named
from runtime.spec import DenoiserSpec, NoiseSchedule, Plan

MAX_SEED = 2**63 - 1
FEW_STEPS = 15  # below it diffusers' DPM-Solver ends with a first-order step (`lower_order_final`)


class Step(NamedTuple):
    """One finished step: its number from 0, its timestep, the sample after it and the x_0 it used."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks of a step
    t: float
    x: np.ndarray
    x0: np.ndarray


def _no_noise(k: int) -> np.ndarray:
    raise BadInput("the solver lcm, and any plan with eta above 0, adds noise at every step: pass fresh_noise")


def sample(
    denoise: Denoise,
    noise: np.ndarray,
    schedule: NoiseSchedule,
    plan: Plan,
    fresh_noise: Callable[[int], np.ndarray] = _no_noise,
) -> Iterator[Step]:
    """Walk the plan from unit `noise` (float32 [N, C, H, W]); the last step's x is the result.

    `denoise(x, point) -> x_0` is the model (it applies guidance and clipping), `fresh_noise(k)` gives unit
    noise like x for step k = 1, 2, ... and is needed where plan.eta > 0 and by the solver lcm. Raises BadInput for
    an unknown solver.
    """
    solver = solver_named(plan.solver)
    points = trajectory(schedule, plan.timesteps, plan.end)
    # the standard deviation of x there for data of unit variance: 1 for variance-preserving schedules
    x = np.float32(np.hypot(points[0].alpha, points[0].sigma)) * noise
    history: deque[Past] = deque(maxlen=MEMORY)
    few = plan.solver == "dpmpp_2m" and plan.steps < FEW_STEPS
    for index, (now, after) in enumerate(zip(points, points[1:], strict=False)):
        if few and after is points[-1]:
            history.clear()  # the last step is then too long in log-SNR to extrapolate over: first order
        x0 = denoise(x, now)
        moved = solver(x, x0, now, after, history, partial(fresh_noise, index + 1), plan.eta)
        if index == 0 and plan.solver in WARM_UP and plan.steps > 1:
            moved = WARM_UP[plan.solver](x, x0, now, after, Past(after, moved, denoise(moved, after)))
        history.append(Past(now, x, x0))
        x = moved
        yield Step(index, now.t, x, x0)


def noise_for(seeds: Sequence[int] | np.ndarray, shape: tuple[int, ...], stream: int = 0) -> np.ndarray:
    """Unit normal noise, float32 [len(seeds), *shape]; one generator per seed (0 to 2^63 - 1) and stream."""
    return np.stack([_philox(int(seed), stream).standard_normal(shape, dtype=np.float32) for seed in seeds])


def generate(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    plan: Plan | None = None,
    batch: int = 8,
    conditions: Conditions | None = None,
) -> np.ndarray:
    """Samples float32 [N, C, H, W], one per seed, made `batch` at a time (the last may be smaller): images in the data
    range, or latents for `runtime.pipeline.decode`.

    `labels` are N class labels; None takes the classes in turn where the model has them. A model of text takes
    `conditions` instead (runtime.pipeline). `plan` defaults to the spec's. Raises BadInput where any of these do not
    fit.
    """
    return np.concatenate(list(generate_batches(network, spec, seeds, labels, plan, batch, conditions)))


def generate_batches(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    labels: Sequence[int] | np.ndarray | None = None,
    plan: Plan | None = None,
    batch: int = 8,
    conditions: Conditions | None = None,
) -> Iterator[np.ndarray]:
    """As `generate`, but yields the samples of one batch after the other."""
    if plan is not None:
        spec = spec.with_plan(plan)
    if batch < 1 or len(seeds) < 1:
        raise BadInput(f"{len(seeds)} samples in batches of {batch}: both must be at least 1")
    if conditions is None:
        classes = labels_in_turn(spec, len(seeds)) if labels is None else np.asarray(labels)
        if classes is not None and classes.shape != (len(seeds),):
            raise BadInput(f"{classes.size} labels for {len(seeds)} seeds: give one label per seed")
        conditions = class_conditions(spec, classes)
    elif labels is not None:
        raise BadInput("give labels or conditions, not both")
    counts = {len(array) for array in (*conditions.given.values(), *(conditions.null or {}).values())}
    if not counts <= {len(seeds)}:
        raise BadInput(f"conditions of {min(counts)} samples for {len(seeds)} seeds: give one each")
    for start in range(0, len(seeds), batch):
        part = slice(start, start + batch)
        samples = _one_batch(network, spec, seeds[part], conditions.part(part))
        yield np.clip(samples, *spec.data_range) if spec.plan.clip else samples


def labels_in_turn(spec: DenoiserSpec, count: int) -> np.ndarray | None:
    """0, 1, ... over the model's classes and round again, int64 [count]; None for a model without classes."""
    if spec.conditioning.kind != "class":
        return None
    return np.arange(count) % spec.conditioning.classes


def _one_batch(
    network: Network,
    spec: DenoiserSpec,
    seeds: Sequence[int] | np.ndarray,
    conditions: Conditions,
) -> np.ndarray:
    plan = spec.plan
    corrections = dict(zip(plan.timesteps, plan.corrections, strict=False))  # one for each, or none
    denoise = make_denoiser(
        network, spec, conditions=conditions, guidance=plan.guidance, clip=plan.clip, corrections=corrections
    )
    noise = noise_for(seeds, spec.sample_shape)
    steps = sample(denoise, noise, spec.schedule, plan, lambda k: noise_for(seeds, spec.sample_shape, stream=k))
    return deque(steps, maxlen=1).pop().x


def _philox(seed: int, stream: int) -> np.random.Generator:
    if not 0 <= seed <= MAX_SEED:
        raise BadInput(f"seed {seed}: must lie in 0..{MAX_SEED}")
    # the highest word of the 256-bit counter: no stream ever runs into the next
    return np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, stream]))
