"""runtime/noise_schedule.py against diffusers' tables and its own formulas."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import (
    betas_schedule,
    flow_schedule,
    noise_level_at,
    noise_level_at_ratio,
    zero_terminal_snr,
)
from diffpress.runtime.sampling_plan import make_plan, plan_levels
from diffpress.runtime.spaced_timesteps import reshifted, space
from diffpress.runtime.timesteps import TimestepSpacing, timesteps_for

COSINE = betas_schedule("squaredcos_cap_v2", 1000)
LINEAR = betas_schedule("linear", 1000)
FLOW = flow_schedule(1001)
BETAS = [
    ("linear", 1000, 1e-4, 0.02),
    ("linear", 50, 1e-3, 0.3),
    ("scaled_linear", 1000, 0.00085, 0.012),
    ("squaredcos_cap_v2", 1000, 1e-4, 0.02),
    ("squaredcos_cap_v2", 50, 1e-4, 0.02),
]


@pytest.mark.parametrize(("kind", "T", "start", "end"), BETAS)
def test_alphas_and_sigmas_equal_those_of_diffusers(kind: str, T: int, start: float, end: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    reference = diffusers.DDPMScheduler(T, beta_start=start, beta_end=end, beta_schedule=kind).alphas_cumprod
    ours = betas_schedule(kind, T, start, end)
    assert np.abs(np.square(ours.alphas) - reference.numpy()).max() < 1e-6
    assert np.abs(np.square(ours.sigmas) - (1 - reference.numpy())).max() < 1e-6


def test_noise_levels_between_timesteps_are_interpolated() -> None:
    flow = noise_level_at(flow_schedule(11), 2.5)
    assert flow == pytest.approx((2.5, 0.75, 0.25))
    between = noise_level_at(LINEAR, 500.5)
    assert LINEAR.sigmas[500] < between.sigma < LINEAR.sigmas[501]
    assert between.alpha**2 + between.sigma**2 == pytest.approx(1.0, abs=2e-5)


@pytest.mark.parametrize("ratio", [0.02, 1.0, 77.0])
def test_a_noise_level_is_found_by_its_ratio(ratio: float) -> None:
    level = noise_level_at_ratio(LINEAR, ratio)
    assert level.sigma / level.alpha == pytest.approx(ratio, rel=1e-9) and noise_level_at(LINEAR, level.t) == level
    assert noise_level_at_ratio(LINEAR, 1e6).t == 999.0 and noise_level_at_ratio(LINEAR, 0.0).t == 0.0


@pytest.mark.parametrize(("kind", "start", "end"), [("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012)])
def test_zero_terminal_snr_matches_diffusers(kind: str, start: float, end: float) -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.DDIMScheduler(1000, start, end, kind, rescale_betas_zero_snr=True).alphas_cumprod.numpy()
    ours = zero_terminal_snr(betas_schedule(kind, 1000, start, end))
    assert ours.alphas[-1] == 0.0 and ours.sigmas[-1] == 1.0
    assert np.abs(np.square(ours.alphas) - theirs).max() < 1e-6


def test_a_trajectory_ends_at_clean_data() -> None:
    levels = plan_levels(COSINE, (999.0, 500.0))
    assert len(levels) == 3 and levels[-1][1:] == (1.0, 0.0)


def test_a_flow_runs_from_data_to_pure_noise() -> None:
    flow = flow_schedule(1000)
    assert (flow.alphas[0], flow.sigmas[0], flow.alphas[-1], flow.sigmas[-1]) == (1.0, 0.0, 0.0, 1.0)


def test_a_trajectory_may_end_at_the_noise_level_of_a_timestep() -> None:
    assert plan_levels(COSINE, (999.0, 500.0), end=0.0)[-1] == noise_level_at(COSINE, 0.0)


def test_a_spacing_adds_its_offset_and_rounds_if_integer() -> None:
    assert space(TimestepSpacing("leading", offset=1), 4, LINEAR).timesteps == (751.0, 501.0, 251.0, 1.0)
    assert space(TimestepSpacing("linspace"), 3, LINEAR).timesteps == (999.0, 500.0, 0.0)
    assert space(TimestepSpacing("linspace", integer=False), 3, LINEAR).timesteps == (999.0, 499.5, 0.0)


def test_a_shift_moves_a_flow_towards_the_noise() -> None:
    plain = TimestepSpacing("flow_trailing", integer=False)
    assert space(plain, 4, FLOW).timesteps == (1000.0, 750.0, 500.0, 250.0)
    shifted = space(replace(plain, shift=3.0), 4, FLOW).timesteps
    assert shifted == pytest.approx((1000.0, 900.0, 750.0, 500.0))  # 3 s / (1 + 2 s)


def test_a_dynamic_shift_is_interpolated_between_two_sizes() -> None:
    spacing = TimestepSpacing("flow_trailing", integer=False, dynamic=(0.0, np.log(9.0), 100, 300))
    at = [space(spacing, 4, FLOW, tokens).timesteps[2] for tokens in (100, 200, 300)]
    assert at == pytest.approx([500.0, 750.0, 900.0])  # k = 1, 3, 9
    assert reshifted((500.0,), spacing, 100, 300, FLOW) == pytest.approx((900.0,))
    assert reshifted(reshifted((321.0,), spacing, 100, 300, FLOW), spacing, 300, 100, FLOW) == pytest.approx((321.0,))


@pytest.mark.parametrize(("dynamic", "tokens"), [((0.5, 1.15, 256, 4096), None), ((0.5, 1.15, 256, 256), 256)])
def test_a_dynamic_shift_without_its_sizes_is_refused(
    dynamic: tuple[float, float, int, int], tokens: int | None
) -> None:
    with pytest.raises(InvalidInputError, match="number of image tokens"):
        space(TimestepSpacing("flow_trailing", integer=False, dynamic=dynamic), 4, FLOW, tokens)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(InvalidInputError, match="use 1 to 1000"):
        make_plan("ddim", steps, COSINE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timesteps_for("trailin", 3, COSINE), "did you mean 'trailing'"),
        (lambda: betas_schedule("cosine"), "unknown beta schedule 'cosine'"),
        (lambda: betas_schedule("linear", 1000, 0.02, 1e-4), "0 < start <= end < 1"),
        (lambda: noise_level_at(COSINE, 999.5), "outside the model's 0..999"),
        (lambda: flow_schedule(1), "at least 2"),
    ],
)
def test_invalid_schedule_arguments_are_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        call()
