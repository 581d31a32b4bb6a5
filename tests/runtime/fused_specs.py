"""The solvers with one evaluation per step, and small specs for fused sampling."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.noise_schedule import betas_schedule, flow_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.solvers import SOLVERS, solver_evaluations
from diffpress.runtime.spec import DenoiserSpec

ONE_EVALUATION = sorted(n for n, solver in SOLVERS.items() if not solver.noisy and solver_evaluations(n, 7) == 7)
OTHERS = sorted(set(SOLVERS) - set(ONE_EVALUATION))
UNCONDITIONAL, CLASSES = Conditioning(), Conditioning("class", classes=4, null_label=4)
SCHEDULES = {"vp": betas_schedule("scaled_linear", 1000, 0.00085, 0.012), "flow": flow_schedule(1000)}
SHAPE = (2, 3, 4)


def spec_of(
    solver: str,
    prediction: str = "epsilon",
    steps: int = 9,
    conditioning: Conditioning = UNCONDITIONAL,
    spacing: str = "trailing",
    **plan: Any,
) -> DenoiserSpec:
    schedule = SCHEDULES["flow" if prediction == "flow" else "vp"]
    clip = plan.pop("clip", solver != "ddim_clip")
    made = make_plan(solver, steps, schedule, spacing=spacing, clip=clip)
    return DenoiserSpec(prediction, schedule, SHAPE, replace(made, **plan), conditioning)
