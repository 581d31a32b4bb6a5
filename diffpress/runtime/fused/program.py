"""Fused sampling program: each step of a deterministic solver as a weighted sum of arrays.

    x_0   = a x + b out + offset[channel], clipped     out = uncond + w (cond - uncond) under guidance, or a forecast:
                                                       the weighted sum of earlier outputs
    kept  = sum_j kept_j term_j                        the current sample after the solver's corrector
    x'    = sum_j moved_j term_j                       the next sample

    terms   x, x_0, x_0 clipped to -1..1, then kept and x_0 of the previous step, of the one before it, ...

Every deterministic solver with one network evaluation per step has this form, so an engine can run the whole loop.
The weights are read off the solver itself, which is run on unit vectors instead of samples; a run on random arrays
then verifies that the step is linear in its terms.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NoReturn

import numpy as np

from diffpress.runtime.caching.forecast import forecast_time, forecast_weights, sources_of
from diffpress.runtime.caching.step_cache import FULL
from diffpress.runtime.denoiser import corrected
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule
from diffpress.runtime.parameterization import to_x0
from diffpress.runtime.sampling_plan import SamplingPlan, plan_steps
from diffpress.runtime.solvers import get_solver
from diffpress.runtime.solvers.contract import MAX_HISTORY, PreviousStep, Solver, StepState
from diffpress.runtime.spec import DenoiserSpec

SAMPLE_TERM, X0_TERM, CLIPPED_TERM = 0, 1, 2
FIRST_HISTORY = 3
TERMS = FIRST_HISTORY + 2 * MAX_HISTORY
COLUMNS = 2 + 2 * TERMS  # of Program.table

Levels = tuple[tuple[NoiseLevel, NoiseLevel], ...]  # where each step starts and ends


@dataclass(frozen=True, eq=False)
class Program:
    """Coefficients of all steps of one sampling run; see the top of this file for the formulas.

    Terms of steps before the first are zero.

    Attributes:
        timesteps: Network timestep of each step.
        halves: 2 under guidance (cond half first, then uncond), else 1.
        guidance: Guidance weight.
        bounds: Clip range of x_0, or None.
        reads: a and b, float32 [steps, 2].
        offsets: float32 [steps, channels].
        kept: Weights of the corrected sample, float32 [steps, TERMS].
        moved: Weights of the next sample, float32 [steps, TERMS].
        forecasts: For each step (index of an earlier step, weight of its output) pairs; empty where the network is
            evaluated.
    """

    timesteps: tuple[float, ...]
    halves: int
    guidance: float
    bounds: tuple[float, float] | None
    reads: np.ndarray
    offsets: np.ndarray
    kept: np.ndarray
    moved: np.ndarray
    forecasts: tuple[tuple[tuple[int, float], ...], ...]

    @property
    def evaluates_all(self) -> bool:
        """Whether every step evaluates the network."""
        return not any(self.forecasts)

    @property
    def steps(self) -> int:
        """Number of steps."""
        return len(self.timesteps)

    @cached_property
    def table(self) -> np.ndarray:
        """`reads`, `kept` and `moved` side by side, float32 [steps, COLUMNS]."""
        return np.concatenate([self.reads, self.kept, self.moved], axis=1)


class _NotLinearError(Exception):
    """The step draws noise, evaluates the network again, or is not a linear function of its terms."""


def fused_program(spec: DenoiserSpec) -> Program | None:
    """Return the program of a spec's sampling plan, or None if only the sampler's loop can run the plan.

    Programs are cached: equal plans share one program.

    Raises:
        InvalidInputError: As in the sampler, for an unknown solver or an epsilon prediction at pure noise.
    """
    guided = is_guided(spec, spec.plan.guidance)
    return _program(spec.prediction, spec.schedule, spec.sample_shape[0], spec.data_range, guided, spec.plan)


@lru_cache(maxsize=64)  # on a GPU, one image of a small model takes no longer than building its program
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
    if plan.cache is not None and plan.cache.kind == "features" and not plan.cache.is_idle:
        return None
    solver, levels = get_solver(plan.solver), plan_steps(schedule, plan)
    try:
        step_weights = [_weights_of_step(solver, schedule, plan, levels, index) for index in range(plan.steps)]
    except _NotLinearError:
        return None
    reads = [_x0_coefficients(prediction, channels, plan, index, level) for index, (level, _) in enumerate(levels)]
    return Program(
        timesteps=plan.timesteps,
        halves=2 if guided else 1,
        guidance=plan.guidance,
        bounds=data_range if plan.clip else None,
        reads=np.array([[a, b] for a, b, _ in reads], np.float32),
        offsets=np.array([offset for _, _, offset in reads], np.float32),
        kept=np.array([kept for kept, _ in step_weights], np.float32),
        moved=np.array([moved for _, moved in step_weights], np.float32),
        forecasts=tuple(_forecast(plan, levels, index) for index in range(plan.steps)),
    )


def _forecast(plan: SamplingPlan, levels: Levels, index: int) -> tuple[tuple[int, float], ...]:
    """Return the earlier steps whose outputs replace that of this step, with their weights; empty if it is full."""
    if plan.cache is None or plan.cache.steps[index] == FULL:
        return ()
    sources = sources_of(plan.cache, index)
    times = [forecast_time(levels[k][0]) for k in sources]
    return tuple(zip(sources, forecast_weights(times, forecast_time(levels[index][0])), strict=True))


def _x0_coefficients(
    prediction: str, channels: int, plan: SamplingPlan, index: int, level: NoiseLevel
) -> tuple[float, float, np.ndarray]:
    """Return a, b and offset of x_0 = a x + b out + offset, including the step's output correction."""
    a, b = to_x0(prediction, np.array([1.0, 0.0]), np.array([0.0, 1.0]), level)
    zeros = np.zeros((1, channels, 1, 1))
    if not plan.output_corrections:
        return a, b, zeros.ravel()
    correction = plan.output_corrections[index]
    offset = corrected(zeros, correction)
    gain = (corrected(zeros + 1.0, correction) - offset).ravel()[0]
    return a, b * gain, b * offset.ravel()


def _weights_of_step(
    solver: Solver, schedule: NoiseSchedule, plan: SamplingPlan, levels: Levels, index: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the weights of all terms in `kept` and in x', float64 [TERMS] each."""

    def step(terms: np.ndarray) -> np.ndarray:
        return np.stack(_step(solver, schedule, plan, levels, index, terms))

    unit = np.eye(TERMS)
    unit[CLIPPED_TERM] = 0.0
    double = unit.copy()
    double[X0_TERM] *= 2.0
    weights, doubled = step(unit), step(double)
    # from x_0 = 1 to x_0 = 2 the clipped term is constant, so the difference is the weight of x_0 alone
    x0_weight = doubled[:, X0_TERM] - weights[:, X0_TERM]
    weights[:, CLIPPED_TERM] = weights[:, X0_TERM] - x0_weight
    weights[:, X0_TERM] = x0_weight

    random_terms = 3.0 * np.random.default_rng(0).standard_normal((TERMS, 8))
    random_terms[CLIPPED_TERM] = np.clip(random_terms[X0_TERM], -1.0, 1.0)
    scale = (np.abs(weights) @ np.abs(random_terms)).max()
    if not np.allclose(step(random_terms), weights @ random_terms, rtol=0.0, atol=1e-9 * scale):
        raise _NotLinearError
    return weights[0], weights[1]


def _step(
    solver: Solver,
    schedule: NoiseSchedule,
    plan: SamplingPlan,
    levels: Levels,
    index: int,
    terms: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Run one step of the solver on `terms` [TERMS, n] as samples; returns `kept` and x'."""
    pairs = terms[FIRST_HISTORY:].reshape(MAX_HISTORY, 2, -1)[: min(index, MAX_HISTORY)]
    history = tuple(PreviousStep(levels[index - 1 - back][0], x, x0) for back, (x, x0) in enumerate(pairs))[::-1]
    x, x0 = terms[SAMPLE_TERM], terms[X0_TERM]
    step = StepState(
        x,
        x0,
        *levels[index],
        history,
        index,
        plan.steps,
        _evaluate_again,
        _draw_noise,
        plan.eta,
        schedule,
    )
    if solver.correct is not None:
        step = step._replace(x=solver.correct(step))
    return step.x, solver.move(step)


def _evaluate_again(x: np.ndarray, level: NoiseLevel) -> NoReturn:
    raise _NotLinearError


def _draw_noise(k: int) -> NoReturn:
    raise _NotLinearError
