"""The sampling plan that a user requests: the bundle's own with other steps, spacing, solver or guidance."""

from __future__ import annotations

import logging
from dataclasses import replace

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.solvers import with_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import spaced_timesteps

logger = logging.getLogger(__name__)

EQUIVALENT_SOLVERS = {"ddim", "euler"}  # identical without fresh noise


def requested_spec(
    spec: DenoiserSpec,
    steps: int | None,
    solver: str | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
) -> DenoiserSpec:
    """Return the spec with the requested plan; warn if a distilled network was not trained for it.

    Raises:
        InvalidInputError: As in `requested_plan`.
    """
    plan = requested_plan(spec, steps, solver, spacing, guidance)
    if spec.distilled and not _is_trained_for(spec, plan):
        logger.warning(
            f"this network was distilled for {_trained_plans(spec)}; other plans may reduce the image quality"
        )
    return spec.with_plan(plan)


def requested_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, spacing: str | None, guidance: float | None
) -> SamplingPlan:
    """Return the spec's plan with the requested changes; None keeps the plan's value.

    New timesteps follow the model's spacing, or, for a distilled network, the plan with that number of steps that it
    was trained for. A plan that differs from the spec's in any way loses its output corrections.

    Raises:
        InvalidInputError: Unknown solver or spacing, an impossible number of steps, or a solver that a distilled
            network was not trained for.
    """
    plan = spec.plan.without_corrections
    if steps is not None or spacing is not None:
        count = plan.steps if steps is None else steps
        layout = spec.spacing if spacing is None else replace(spec.spacing, kind=spacing, offset=0)
        trained = (spec.plan.timesteps, *spec.distilled_timesteps) if spec.distilled and spacing is None else ()
        timesteps = next((known for known in trained if len(known) == count), None)
        if timesteps is None:
            timesteps = spaced_timesteps(layout, count, spec.schedule, spec.tokens(spec.sample_shape))
        plan = plan.over(timesteps)
    if solver is not None:
        plan = with_solver(plan, solver)
        if spec.distilled and not {solver, spec.plan.solver} <= EQUIVALENT_SOLVERS and solver != spec.plan.solver:
            raise InvalidInputError(
                f"--solver {solver}: this network was distilled ({spec.distilled}) for {_trained_plans(spec)} and "
                "supports no other solver; omit --solver"
            )
    if guidance is not None:
        plan = replace(plan, guidance=guidance)
    return spec.plan if plan == spec.plan.without_corrections else plan


def plan_description(spec: DenoiserSpec) -> str:
    """Return the number of steps and the solver in words, such as '4 steps of euler'."""
    return f"{spec.plan.steps} {'step' if spec.plan.steps == 1 else 'steps'} of {spec.plan.solver}"


def _trained_plans(spec: DenoiserSpec) -> str:
    others = "".join(f" or {len(timesteps)}" for timesteps in spec.distilled_timesteps)
    return f"its own plan, {plan_description(spec)}{others and f' ({others[1:]})'}"


def _is_trained_for(spec: DenoiserSpec, plan: SamplingPlan) -> bool:
    """Whether a distilled network was trained for this plan: its own, possibly over its other timesteps."""
    return plan == spec.plan or any(
        plan == spec.plan.without_corrections.over(other) for other in spec.distilled_timesteps
    )
