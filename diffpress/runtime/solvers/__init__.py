"""Solvers: pure functions that move a noisy sample from one noise level to the next lower one.

One solver family per file. Their common contract is in runtime/solvers/contract.py; docs/solvers.md helps to choose.
"""

from __future__ import annotations

from functools import partial

from diffpress.runtime.errors import unknown_name
from diffpress.runtime.solvers import dpm, unipc
from diffpress.runtime.solvers.adams import ipndm, plms, plms_evaluations
from diffpress.runtime.solvers.consistency import consistency, lcm
from diffpress.runtime.solvers.contract import Solver, two_per_step_except_last
from diffpress.runtime.solvers.ddim import ancestral, ddim, ddim_clip, ddpm_large, euler
from diffpress.runtime.solvers.deis import deis
from diffpress.runtime.solvers.heun import heun
from diffpress.runtime.solvers.lms import lms
from diffpress.runtime.solvers.midpoint import kdpm2
from diffpress.runtime.solvers.pndm import pndm, pndm_evaluations

CLIPPING = "ddim_clip"  # the only solver that clips x_0 itself

SOLVERS: dict[str, Solver] = {
    "ddim": Solver(ddim),
    CLIPPING: Solver(ddim_clip),
    "ddpm": Solver(ancestral, noisy=True),
    "ddpm_large": Solver(ddpm_large, noisy=True),
    "euler": Solver(euler),
    "euler_ancestral": Solver(ancestral, noisy=True),
    "heun": Solver(partial(heun, "epsilon"), evaluations=two_per_step_except_last),
    "heun_flow": Solver(partial(heun, "flow"), evaluations=two_per_step_except_last),
    "kdpm2": Solver(kdpm2, evaluations=two_per_step_except_last),
    "lms": Solver(lms),
    "dpm_2m": Solver(dpm.dpm_2m),
    "dpmpp_2m": Solver(dpm.dpmpp_2m),
    "dpmpp_2m_heun": Solver(dpm.dpmpp_2m_heun),
    "dpmpp_2s": Solver(dpm.dpmpp_2s),
    "dpmpp_3m": Solver(dpm.dpmpp_3m),
    "dpmpp_2m_sde": Solver(dpm.dpmpp_2m_sde, noisy=True),
    "dpmpp_sde": Solver(dpm.dpmpp_sde, evaluations=two_per_step_except_last, noisy=True),
    **{f"unipc_{k}": Solver(partial(unipc.predict, k), partial(unipc.correct, k)) for k in (1, 2, 3)},
    **{
        f"unipc_bh1_{k}": Solver(partial(unipc.predict, k, bh1=True), partial(unipc.correct, k, bh1=True))
        for k in (1, 2, 3)
    },
    **{f"deis_{k}": Solver(partial(deis, k)) for k in (2, 3)},
    "ipndm": Solver(ipndm),
    "plms": Solver(partial(plms, "epsilon"), evaluations=plms_evaluations),
    "plms_v": Solver(partial(plms, "v"), evaluations=plms_evaluations),
    "pndm": Solver(partial(pndm, "epsilon"), evaluations=pndm_evaluations),
    "pndm_v": Solver(partial(pndm, "v"), evaluations=pndm_evaluations),
    "lcm": Solver(lcm, noisy=True),
    "consistency": Solver(consistency, noisy=True),
}


def get_solver(name: str) -> Solver:
    """Return the solver of that name; raise InvalidInputError with the nearest match if there is none."""
    if name not in SOLVERS:
        raise unknown_name("solver", name, SOLVERS)
    return SOLVERS[name]


def solver_evaluations(solver: str, steps: int) -> int:
    """Return how often a solver evaluates the denoiser in a plan with this many steps."""
    return get_solver(solver).evaluations(steps)
