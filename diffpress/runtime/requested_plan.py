"""The sampling plan that a user requests: the bundle's own with other steps, spacing, solver or guidance."""

from __future__ import annotations

import logging
from dataclasses import replace

import numpy as np

from diffpress.runtime.carried_settings import settings_of, with_solver
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan, plan_steps
from diffpress.runtime.spaced_timesteps import with_kind
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

LEAST_SCALE = 1e-4  # bounds log(sigma / alpha) at pure noise and at clean data
EQUIVALENT_SOLVERS = {"ddim", "euler"}  # identical without fresh noise


def requested_spec(
    spec: DenoiserSpec,
    steps: int | None,
    solver: str | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
    *,
    step_cache: bool = True,
) -> DenoiserSpec:
    """Return the spec with the requested plan.

    Warns if a distilled network was not trained for it, or if the step cache does not fit it and is dropped. With
    `step_cache` False, every step evaluates the whole network.

    Raises:
        InvalidInputError: As in `requested_plan`.
    """
    if not step_cache:
        spec = spec.with_plan(spec.plan.without_cache)
    plan = requested_plan(spec, steps, solver, spacing, guidance)
    warn_of_lost_cache(spec, plan)
    if spec.distilled and not _is_trained_for(spec, plan):
        logger.warning(
            f"this network was distilled for {_trained_plans(spec)}; other plans may reduce the image quality"
        )
    return spec.with_plan(plan)


def requested_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, spacing: str | None, guidance: float | None
) -> SamplingPlan:
    """Return the spec's plan with the requested changes; None keeps the plan's value.

    New timesteps follow the model's spacing as the solver carries it over, or, for a distilled network, the plan with
    that number of steps that it was trained for. Another solver takes new timesteps, unless the plan's were chosen by
    hand or by a search. Output corrections are interpolated to other timesteps; another solver or guidance drops them.
    The step cache is kept with another guidance, and dropped with other timesteps or another solver.

    Raises:
        InvalidInputError: Unknown solver or spacing, an impossible number of steps, or a solver that a distilled
            network was not trained for or that cannot sample the model.
    """
    own = spec.plan.without_corrections
    plan = own
    if solver is not None:
        plan = with_solver(spec, solver).without_corrections
        if spec.distilled and not {plan.solver, own.solver} <= EQUIVALENT_SOLVERS and plan.solver != own.solver:
            raise InvalidInputError(
                f"--solver {solver}: this network was distilled ({spec.distilled}) for {_trained_plans(spec)} and "
                "supports no other solver; omit --solver"
            )
    if steps is not None or spacing is not None or _respaces(spec, plan):
        plan = _spaced(spec, plan, own.steps if steps is None else steps, spacing)
    if guidance is not None:
        plan = replace(plan, guidance=guidance)
    if plan == own:
        return spec.plan
    if not spec.plan.output_corrections or plan != replace(
        own, timesteps=plan.timesteps, ratios=plan.ratios, stride=plan.stride, cache=plan.cache
    ):
        return plan
    return replace(plan, output_corrections=_interpolated_corrections(spec, plan))


def warn_of_lost_cache(spec: DenoiserSpec, plan: SamplingPlan) -> None:
    """Warn if the spec's plan has a step cache, which this plan in its place has not."""
    if spec.plan.cache is not None and plan.cache is None:
        logger.warning(
            f"the step cache was measured for {plan_description(spec)} over its own timesteps; it does not fit the "
            "requested plan and is left out, so that every step evaluates the whole network"
        )


def plan_description(spec: DenoiserSpec, first: int = 0) -> str:
    """Return the number of steps, from `first` on, and the solver in words, such as '4 steps of euler'."""
    run = f"{spec.plan.steps - first} of " if first else ""
    return f"{run}{spec.plan.steps} {'step' if spec.plan.steps == 1 else 'steps'} of {spec.plan.solver}"


def _spaced(spec: DenoiserSpec, plan: SamplingPlan, steps: int, spacing: str | None) -> SamplingPlan:
    """Return the plan over `steps` timesteps of the requested spacing, or else of its solver's."""
    if spec.distilled and spacing is None:
        trained = next((t for t in (spec.plan.timesteps, *spec.distilled_timesteps) if len(t) == steps), None)
        if trained is not None:
            return plan.over(trained)
    layout = settings_of(spec, plan.solver).spacing if spacing is None else with_kind(spec.spacing, spacing)
    spaced = plan.spaced(layout, steps, spec.schedule, spec.tokens(spec.sample_shape))
    if spec.takes_integers and any(t % 1.0 for t in spaced.timesteps):
        raise InvalidInputError(
            f"solver '{plan.solver}' takes fractional timesteps here, which this network does not; use another solver, "
            "or choose a spacing, such as --spacing trailing"
        )
    return spaced


def _respaces(spec: DenoiserSpec, plan: SamplingPlan) -> bool:
    """Whether another solver needs other timesteps: those of the spec's plan are its own solver's spacing."""
    own = spec.plan.without_corrections
    return plan.solver != own.solver and not spec.distilled and own == _spaced(spec, own, own.steps, None)


def _interpolated_corrections(spec: DenoiserSpec, plan: SamplingPlan) -> tuple[OutputCorrection, ...]:
    """Return the corrections of the spec's plan at the noise levels of another, interpolated linearly in log-SNR."""
    known = [_log_ratio(level) for level, _ in plan_steps(spec.schedule, spec.plan)][::-1]
    wanted = [_log_ratio(level) for level, _ in plan_steps(spec.schedule, plan)]
    corrections = spec.plan.output_corrections[::-1]
    slopes = np.interp(wanted, known, [correction.slope for correction in corrections])
    biases = np.array([correction.bias for correction in corrections]).T
    columns = np.array([np.interp(wanted, known, bias) for bias in biases]).T
    return tuple(
        OutputCorrection(float(slope), tuple(bias)) for slope, bias in zip(slopes, columns.tolist(), strict=True)
    )


def _log_ratio(level: NoiseLevel) -> float:
    """Return log(sigma / alpha), bounded: minus half the log-SNR."""
    return float(np.log(max(level.sigma, LEAST_SCALE) / max(level.alpha, LEAST_SCALE)))


def _trained_plans(spec: DenoiserSpec) -> str:
    others = "".join(f" or {len(timesteps)}" for timesteps in spec.distilled_timesteps)
    return f"its own plan, {plan_description(spec)}{others and f' ({others[1:]})'}"


def _is_trained_for(spec: DenoiserSpec, plan: SamplingPlan) -> bool:
    """Whether a distilled network was trained for this plan: its own, possibly over its other timesteps."""
    return plan == spec.plan or any(
        plan.without_corrections == spec.plan.without_corrections.over(other) for other in spec.distilled_timesteps
    )
