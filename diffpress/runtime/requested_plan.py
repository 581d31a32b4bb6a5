"""The sampling plan that was requested: the bundle's own with other steps, spacing, solver or guidance."""

from __future__ import annotations

import sys
from dataclasses import replace

from diffpress.runtime.errors import BadInput
from diffpress.runtime.sampling_plan import Plan
from diffpress.runtime.solvers import with_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import spaced_timesteps

ALIKE = {"ddim", "euler"}  # without fresh noise the same step


def asked_spec(
    spec: DenoiserSpec,
    steps: int | None,
    solver: str | None = None,
    grid: str | None = None,
    guidance: float | None = None,
) -> DenoiserSpec:
    """The spec with the plan that was asked for (chosen_plan); says so where a distilled network was not taught it."""
    plan = chosen_plan(spec, steps, solver, grid, guidance)
    if spec.distilled and not _is_taught(spec, plan):
        _warn(f"this network was distilled for {_taught(spec)}; the quality of other plans is not promised")
    return spec.with_plan(plan)


def chosen_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, grid: str | None, guidance: float | None
) -> Plan:
    """The spec's plan with what was asked for in its place; new timesteps lie as the model's spacing has them, or as a
    distilled network was taught so many.

    A plan that differs from the spec's in anything is left without its corrections. Raises BadInput for a solver that
    does not fit a distilled network.
    """
    plan = spec.plan.uncorrected
    if steps is not None or grid is not None:
        count = plan.steps if steps is None else steps
        spacing = spec.spacing if grid is None else replace(spec.spacing, grid=grid, offset=0)
        taught = (spec.plan.timesteps, *spec.distilled_also) if spec.distilled and grid is None else ()
        timesteps = next((known for known in taught if len(known) == count), None)
        if timesteps is None:
            timesteps = spaced_timesteps(spacing, count, spec.schedule, spec.tokens(spec.sample_shape))
        plan = plan.over(timesteps)
    if solver is not None:
        plan = with_solver(plan, solver)
        if spec.distilled and not {solver, spec.plan.solver} <= ALIKE and solver != spec.plan.solver:
            raise BadInput(
                f"--solver {solver}: this network was distilled ({spec.distilled}) for {_taught(spec)}, and other "
                "solvers do not fit it; leave the solver out"
            )
    if guidance is not None:
        plan = replace(plan, guidance=guidance)
    return spec.plan if plan == spec.plan.uncorrected else plan


def own_plan(spec: DenoiserSpec) -> str:
    return f"{spec.plan.steps} {'step' if spec.plan.steps == 1 else 'steps'} of {spec.plan.solver}"


def _taught(spec: DenoiserSpec) -> str:
    others = "".join(f" or {len(timesteps)}" for timesteps in spec.distilled_also)
    return f"its own plan, {own_plan(spec)}{others and f' ({others[1:]})'}"


def _is_taught(spec: DenoiserSpec, plan: Plan) -> bool:
    """Whether a distilled network was taught this plan: its own, or it over other timesteps that it knows."""
    return plan == spec.plan or any(plan == spec.plan.uncorrected.over(other) for other in spec.distilled_also)


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
