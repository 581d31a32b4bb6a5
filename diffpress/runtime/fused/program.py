"""Walks that are weighted sums of arrays, as a table of numbers: for engines that keep samples where they compute.

    x_0   = a x + b out + offset[channel], bounded     out = null + w (label - null) under guidance
    kept  = sum_j kept_j term_j                        the sample at hand after the solver's corrector
    x'    = sum_j moved_j term_j                       the next sample

    terms   x, x_0, x_0 bounded to -1..1, then kept and x_0 of the last step, of the one before, ...

Every deterministic solver that asks the network once a step is such a sum, whatever its formula is. So nothing is
written twice: the solver walks on unit vectors in the place of samples, and what comes out are its numbers. That they
are all there is to it is tried with a draw of other arrays.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import numpy as np

from diffpress.runtime.denoiser import corrected
from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import SamplingPlan, plan_levels
from diffpress.runtime.solvers import solver_named
from diffpress.runtime.solvers.contract import MAX_HISTORY, PreviousStep, Solver, StepState
from diffpress.runtime.spec import DenoiserSpec

SAMPLE_TERM, GUESS, BOUNDED = 0, 1, 2
FIRST_HISTORY = 3
TERMS = FIRST_HISTORY + 2 * MAX_HISTORY
COLUMNS = 2 + 2 * TERMS  # of a program's table


@dataclass(frozen=True, eq=False)
class Program:
    """One walk from the starting sample to the last: see the top of this file.

    `timesteps` are what the network is told step by step, `halves` is 2 under guidance, whose weight `guidance` is (the
    given half first, then the null one), `bounds` those of x_0 or None. float32: `reads` [steps, 2] are a and b,
    `offsets` [steps, channels], `kept` and `moved` [steps, TERMS]. Terms of steps before the first count as zeros.
    """

    timesteps: tuple[float, ...]
    halves: int
    guidance: float
    bounds: tuple[float, float] | None
    reads: np.ndarray
    offsets: np.ndarray
    kept: np.ndarray
    moved: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.timesteps)

    @cached_property
    def table(self) -> np.ndarray:
        """`reads`, `kept` and `moved` side by side, float32 [steps, COLUMNS]."""
        return np.concatenate([self.reads, self.kept, self.moved], axis=1)


class FusedSampler(Protocol):
    """A network that can walk a whole program by itself (diffpress.runtime.network_inputs.Network is its other half)."""

    def run_fused(
        self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray
    ) -> np.ndarray | None:
        """The last sample, float32 [N, C, H, W], of the walk from `start`; None for one that it cannot do here.

        `static_inputs` are the graph's inputs besides sample and timestep, [halves N, ...] each, the same in all steps.
        """


def step_by_step(network: Any) -> Any:
    """The network without its own walk: the sampler's loop asks it for every step."""
    return SimpleNamespace(inputs=network.inputs, run=network.run)


def fused_only(network: Any) -> Any:
    """The network's own walk without its single steps: Unfit where it leaves a walk to the loop."""

    def refused(_: dict[str, np.ndarray]) -> NoReturn:
        raise EngineUnavailableError("it does not walk this plan by itself, or not here")

    return SimpleNamespace(inputs=network.inputs, run=refused, run_fused=network.run_fused)


class _NotLinear(Exception):
    """The step draws noise, asks the network again, or is no sum of its terms."""


def fused_program(spec: DenoiserSpec) -> Program | None:
    """The spec's plan as a program; None where it is none, and only the sampler itself can walk it.

    The same program for the same plan: it is made once. Raises InvalidInputError as the sampler does, for an unknown solver and
    for an epsilon prediction at pure noise.
    """
    guided = is_guided(spec, spec.plan.guidance)
    return _program(spec.prediction, spec.schedule, spec.sample_shape[0], spec.data_range, guided, spec.plan)


@lru_cache(maxsize=64)  # on a GPU one image of a small model takes no longer than its table
def _program(
    prediction: str,
    schedule: NoiseSchedule,
    channels: int,
    data_range: tuple[float, float],
    guided: bool,
    plan: SamplingPlan,
) -> Program | None:
    if plan.threshold is not None or plan.guidance_rescale > 0 or plan.guidance_interval is not None:
        return None
    solver, levels = solver_named(plan.solver), plan_levels(schedule, plan.timesteps, plan.end)
    try:
        sums = [_sums(solver, schedule, plan, levels, index) for index in range(plan.steps)]
    except _NotLinear:
        return None
    reads = [_read(prediction, channels, plan, index, level) for index, level in enumerate(levels[:-1])]
    return Program(
        timesteps=plan.timesteps,
        halves=2 if guided else 1,
        guidance=plan.guidance,
        bounds=data_range if plan.clip else None,
        reads=np.array([[a, b] for a, b, _ in reads], np.float32),
        offsets=np.array([offset for _, _, offset in reads], np.float32),
        kept=np.array([kept for kept, _ in sums], np.float32),
        moved=np.array([moved for _, moved in sums], np.float32),
    )


def _read(
    prediction: str, channels: int, plan: SamplingPlan, index: int, level: NoiseLevel
) -> tuple[float, float, np.ndarray]:
    """a, b and offset: what reading x_0 off, after the step's correction, makes of x = 1 and of out = 1."""
    a, b = to_x0(prediction, np.array([1.0, 0.0]), np.array([0.0, 1.0]), level)
    nothing = np.zeros((1, channels, 1, 1))
    if not plan.output_corrections:
        return a, b, nothing.ravel()
    correction = plan.output_corrections[index]
    offset = corrected(nothing, correction)
    gain = (corrected(nothing + 1.0, correction) - offset).ravel()[0]
    return a, b * gain, b * offset.ravel()


def _sums(
    solver: Solver, schedule: NoiseSchedule, plan: SamplingPlan, levels: tuple[NoiseLevel, ...], index: int
) -> tuple[np.ndarray, np.ndarray]:
    """The weights of all terms in `kept` and in x', float64 [TERMS] each."""

    def step(terms: np.ndarray) -> np.ndarray:
        return np.stack(_step(solver, schedule, plan, levels, index, terms))

    unit = np.eye(TERMS)
    unit[BOUNDED] = 0.0
    double = unit.copy()
    double[GUESS] *= 2.0
    weights, doubled = step(unit), step(double)
    # beyond 1 the bounded x_0 stays where it is: what still grows is the weight of x_0 itself
    guess = doubled[:, GUESS] - weights[:, GUESS]
    weights[:, BOUNDED] = weights[:, GUESS] - guess
    weights[:, GUESS] = guess

    drawn = 3.0 * np.random.default_rng(0).standard_normal((TERMS, 8))
    drawn[BOUNDED] = np.clip(drawn[GUESS], -1.0, 1.0)
    scale = (np.abs(weights) @ np.abs(drawn)).max()
    if not np.allclose(step(drawn), weights @ drawn, rtol=0.0, atol=1e-9 * scale):
        raise _NotLinear
    return weights[0], weights[1]


def _step(
    solver: Solver,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    levels: tuple[NoiseLevel, ...],
    index: int,
    terms: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """One step of the solver on `terms` [TERMS, n] in the place of samples: `kept` and x'."""
    pairs = terms[FIRST_HISTORY:].reshape(MAX_HISTORY, 2, -1)[: min(index, MAX_HISTORY)]
    history = tuple(PreviousStep(levels[index - 1 - back], x, x0) for back, (x, x0) in enumerate(pairs))[::-1]
    x, x0 = terms[SAMPLE_TERM], terms[GUESS]
    step = StepState(
        x, x0, levels[index], levels[index + 1], history, index, plan.steps, _again, _noise, plan.eta, schedule
    )
    if solver.correct is not None:
        step = step._replace(x=solver.correct(step))
    return step.x, solver.move(step)


def _again(x: np.ndarray, level: NoiseLevel) -> NoReturn:
    raise _NotLinear


def _noise(k: int) -> NoReturn:
    raise _NotLinear
