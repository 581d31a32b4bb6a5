"""The sampling plan that was requested: the bundle's own with other steps, spacing, solver or guidance."""

from __future__ import annotations

import sys
from dataclasses import replace

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.solvers import with_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import spaced_timesteps

EQUIVALENT_SOLVERS = {"ddim", "euler"}  # without fresh noise the same step


def requested_spec(
    spec: DenoiserSpec,
    steps: int | None,
    solver: str | None = None,
    spacing: str | None = None,
    guidance: float | None = None,
) -> DenoiserSpec:
    """The spec with the plan that was asked for (requested_plan); says so where a distilled network was not taught it."""
    plan = requested_plan(spec, steps, solver, spacing, guidance)
    if spec.distilled and not _is_trained_for(spec, plan):
        _warn(f"this network was distilled for {_trained_plans(spec)}; the quality of other plans is not promised")
    return spec.with_plan(plan)


def requested_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, spacing: str | None, guidance: float | None
) -> SamplingPlan:
    """The spec's plan with what was asked for in its place; new timesteps lie as the model's spacing has them, or as a
    distilled network was taught so many.

    A plan that differs from the spec's in anything is left without its corrections. Raises InvalidInputError for a solver that
    does not fit a distilled network.
    """
    plan = spec.plan.without_corrections
    if steps is not None or spacing is not None:
        count = plan.steps if steps is None else steps
        layout = spec.spacing if spacing is None else replace(spec.spacing, kind=spacing, offset=0)
        taught = (spec.plan.timesteps, *spec.distilled_timesteps) if spec.distilled and spacing is None else ()
        timesteps = next((known for known in taught if len(known) == count), None)
        if timesteps is None:
            timesteps = spaced_timesteps(layout, count, spec.schedule, spec.tokens(spec.sample_shape))
        plan = plan.over(timesteps)
    if solver is not None:
        plan = with_solver(plan, solver)
        if spec.distilled and not {solver, spec.plan.solver} <= EQUIVALENT_SOLVERS and solver != spec.plan.solver:
            raise InvalidInputError(
                f"--solver {solver}: this network was distilled ({spec.distilled}) for {_trained_plans(spec)}, and other "
                "solvers do not fit it; leave the solver out"
            )
    if guidance is not None:
        plan = replace(plan, guidance=guidance)
    return spec.plan if plan == spec.plan.without_corrections else plan


def plan_description(spec: DenoiserSpec) -> str:
    return f"{spec.plan.steps} {'step' if spec.plan.steps == 1 else 'steps'} of {spec.plan.solver}"


def _trained_plans(spec: DenoiserSpec) -> str:
    others = "".join(f" or {len(timesteps)}" for timesteps in spec.distilled_timesteps)
    return f"its own plan, {plan_description(spec)}{others and f' ({others[1:]})'}"


def _is_trained_for(spec: DenoiserSpec, plan: SamplingPlan) -> bool:
    """Whether a distilled network was taught this plan: its own, or it over other timesteps that it knows."""
    return plan == spec.plan or any(
        plan == spec.plan.without_corrections.over(other) for other in spec.distilled_timesteps
    )


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
