"""Solvers: pure functions that carry a noisy sample from one point to the next, cleaner one.

One family a file; the contract that all of them keep is in runtime/solvers/contract.py, and docs/solvers.md says which
to take when.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from diffpress.runtime.errors import unknown_name
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.solvers import dpm, unipc
from diffpress.runtime.solvers.adams import ipndm, plms, plms_evaluations
from diffpress.runtime.solvers.consistency import consistency, lcm
from diffpress.runtime.solvers.contract import Solver, two_per_step_but_last
from diffpress.runtime.solvers.ddim import ancestral, ddim, ddim_clip, ddpm_large, euler
from diffpress.runtime.solvers.deis import deis
from diffpress.runtime.solvers.heun import heun

CLIPPING = "ddim_clip"  # the one solver that bounds x_0 itself

SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim),
    CLIPPING: Solver(ddim_clip),
    "ddpm": Solver(ancestral, noisy=True),
    "ddpm_large": Solver(ddpm_large, noisy=True),
    "euler": Solver(euler),
    "euler_ancestral": Solver(ancestral, noisy=True),
    "heun": Solver(partial(heun, "epsilon"), evaluations=two_per_step_but_last),
    "heun_flow": Solver(partial(heun, "flow"), evaluations=two_per_step_but_last),
    "dpmpp_2m": Solver(dpm.dpmpp_2m),
    "dpmpp_3m": Solver(dpm.dpmpp_3m),
    "dpmpp_2m_sde": Solver(dpm.dpmpp_2m_sde, noisy=True),
    "dpmpp_sde": Solver(dpm.dpmpp_sde, evaluations=two_per_step_but_last, noisy=True),
    **{f"unipc_{k}": Solver(partial(unipc.predict, k), partial(unipc.correct, k)) for k in (1, 2, 3)},
    **{f"deis_{k}": Solver(partial(deis, k)) for k in (2, 3)},
    "ipndm": Solver(ipndm),
    "plms": Solver(partial(plms, "epsilon"), evaluations=plms_evaluations),
    "plms_v": Solver(partial(plms, "v"), evaluations=plms_evaluations),
    "lcm": Solver(lcm, noisy=True),
    "consistency": Solver(consistency, noisy=True),
}


def solver_named(name: str) -> Solver:
    """The solver of that name; raises InvalidInputError naming the nearest match."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def with_solver(plan: SamplingPlan, name: str) -> SamplingPlan:
    """The plan walked by another solver; raises InvalidInputError for an unknown one.

    Where to start and to end belongs to the solver the checkpoint came with, corrections to the one they were measured
    with. The plan bounds x_0, or its solver does: never both.
    """
    solver_named(name)
    if name == plan.solver:
        return plan
    clip = (plan.clip or plan.solver == CLIPPING) and name != CLIPPING
    return replace(plan, solver=name, start=SamplingPlan.start, end=None, clip=clip, output_corrections=())


def solver_evaluations(solver: str, steps: int) -> int:
    """How often that solver asks the network on a plan of so many steps."""
    return solver_named(solver).evaluations(steps)
