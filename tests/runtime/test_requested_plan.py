"""runtime/requested_plan.py: which timesteps, ends and output corrections a requested plan has."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.requested_plan import requested_plan
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan, make_plan, plan_steps
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import TimestepSpacing

LATENT = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)


def spec_with(
    plan: SamplingPlan, schedule: NoiseSchedule = LATENT, spacing: TimestepSpacing | None = None, kind: str = "none"
) -> DenoiserSpec:
    spacing = spacing or TimestepSpacing()
    prediction = "flow" if schedule.alphas[-1] == 0.0 else "epsilon"
    return DenoiserSpec(prediction, schedule, (2, 4, 4), plan, conditioning=Conditioning(kind), spacing=spacing)


def log_ratios(spec: DenoiserSpec, plan: SamplingPlan) -> np.ndarray:
    return np.array([np.log(level.sigma / level.alpha) for level, _ in plan_steps(spec.schedule, plan)])


@pytest.mark.parametrize("steps", [10, 13, 30])
def test_other_timesteps_keep_the_output_corrections_interpolated_in_log_snr(steps: int) -> None:
    """Corrections that are linear in log-SNR stay exact between the plan's ends, and constant beyond them."""
    spec = spec_with(make_plan("dpmpp_2m", 20, LATENT))
    known = log_ratios(spec, spec.plan)
    corrections = tuple(OutputCorrection(0.01 * r, (0.2 + 0.1 * r, -0.3 * r)) for r in known)
    spec = spec.with_plan(replace(spec.plan, output_corrections=corrections))
    plan = requested_plan(spec, steps, None, None, None)
    expected = np.clip(log_ratios(spec, plan), known.min(), known.max())
    assert plan.steps == steps and len(plan.output_corrections) == steps
    assert np.allclose([c.slope for c in plan.output_corrections], 0.01 * expected)
    assert np.allclose([c.bias for c in plan.output_corrections], np.stack([0.2 + 0.1 * expected, -0.3 * expected], 1))
    assert requested_plan(spec, 20, None, None, None) == spec.plan


@pytest.mark.parametrize("change", [(None, "ipndm", None, None), (10, "ddim", None, None), (None, None, None, 3.0)])
def test_another_solver_or_guidance_drops_the_output_corrections(
    change: tuple[int | None, str | None, str | None, float | None],
) -> None:
    corrections = (OutputCorrection(0.1, (0.2, 0.2)),) * 20
    spec = spec_with(replace(make_plan("dpmpp_2m", 20, LATENT), output_corrections=corrections))
    assert not requested_plan(spec, *change).output_corrections


@pytest.mark.parametrize(
    ("solver", "first"), [("dpmpp_2m", 889.0), ("unipc_2", 889.0), ("lcm", 999.0), ("ddim", 876.0), ("ipndm", 876.0)]
)
def test_leading_spacing_becomes_that_of_the_solver(solver: str, first: float) -> None:
    spacing = TimestepSpacing("leading", offset=1)
    spec = spec_with(SamplingPlan("euler", (0.0,)).spaced(spacing, 30, LATENT), spacing=spacing)
    assert requested_plan(spec, 8, solver, None, None).timesteps[0] == first
    assert requested_plan(spec, 8, solver, "karras", None).timesteps[0] == 999.0  # the user's own spacing


def test_custom_models_keep_trailing_timesteps_and_flows_keep_theirs() -> None:
    spec = spec_with(make_plan("ddim", 10, LATENT))
    for solver in ("dpmpp_2m", "euler", "unipc_2", "heun", "plms"):
        assert requested_plan(spec, None, solver, None, None).timesteps == spec.plan.timesteps
    flow, spacing = flow_schedule(1001), TimestepSpacing("flow_linspace", integer=False, shift=3.0)
    spec = spec_with(SamplingPlan("euler", (0.0,)).spaced(spacing, 8, flow), flow, spacing)
    found = requested_plan(spec, None, "dpmpp_2m", None, None)
    assert (found.timesteps, found.start, found.end) == (spec.plan.timesteps, "marginal", None)


def test_fractional_timesteps_are_refused_for_networks_that_take_integers() -> None:
    spacing = TimestepSpacing("linspace")
    plan = SamplingPlan("ddim", (0.0,)).spaced(spacing, 8, LATENT)
    with pytest.raises(InvalidInputError, match=r"solver 'euler' takes fractional timesteps .* --spacing trailing"):
        requested_plan(spec_with(plan, spacing=spacing), 8, "euler", None, None)
    found = requested_plan(spec_with(plan, spacing=spacing, kind="text"), 8, "euler", None, None)
    assert found.timesteps[1] % 1.0 and found.start == "noise" and len(found.ratios) == 8
