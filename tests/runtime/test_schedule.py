"""runtime/schedule.py against diffusers' tables and against the formulas it states."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.errors import BadInput
from runtime.schedule import (
    GRIDS,
    betas_schedule,
    flow_schedule,
    make_plan,
    point_at,
    reshifted,
    spaced_timesteps,
    timestep_grid,
    trajectory,
)
from runtime.spec import NoiseSchedule, Spacing

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


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 16, 50, 999, 1000])
def test_plain_grids_equal_those_of_diffusers(kind: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=kind, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert timestep_grid(kind, steps, LINEAR) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("kind", "option"), [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas")]
)
def test_sigma_grids_visit_the_noise_levels_of_diffusers(kind: str, option: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    scheduler = diffusers.EulerDiscreteScheduler(1000, timestep_spacing="linspace", **{option: True})
    scheduler.set_timesteps(12)
    points = [point_at(LINEAR, t) for t in timestep_grid(kind, 12, LINEAR, whole=False)]
    ratios = np.array([point.sigma / point.alpha for point in points])
    assert np.allclose(ratios, scheduler.sigmas.numpy()[:-1], rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(GRIDS) - {"lcm"}))  # which has 50 timesteps
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 999, 1000])
@pytest.mark.parametrize("schedule", [COSINE, LINEAR, flow_schedule(1000)], ids=["cosine", "linear", "flow"])
def test_every_grid_gives_that_many_whole_descending_timesteps(kind: str, steps: int, schedule: NoiseSchedule) -> None:
    t = np.array(timestep_grid(kind, steps, schedule))
    assert len(t) == steps and (np.diff(t) <= -1).all() and t[0] <= 999 and t[-1] >= 0 and (t == np.round(t)).all()


@pytest.mark.parametrize("kind", sorted(set(GRIDS) - {"leading", "dpm_leading"}))
def test_a_single_step_starts_at_the_noisy_end(kind: str) -> None:
    assert timestep_grid(kind, 1, COSINE)[0] >= 990


def test_quad_grid_follows_its_formula() -> None:
    assert timestep_grid("quad", 4, LINEAR) == (999.0, 444.0, 111.0, 0.0)


def test_logsnr_grid_is_uniform_in_log_snr() -> None:
    points = [point_at(COSINE, t) for t in timestep_grid("logsnr", 9, COSINE, whole=False)]
    steps = np.diff([np.log(point.alpha / point.sigma) for point in points])
    assert np.allclose(steps, steps[0], rtol=1e-9)


@pytest.mark.parametrize("kind", ["karras", "logsnr"])
@pytest.mark.parametrize("schedule", [COSINE, flow_schedule(1000)], ids=["cosine", "flow"])
def test_ratio_grids_leave_out_where_no_image_is_left(kind: str, schedule: NoiseSchedule) -> None:
    first = point_at(schedule, timestep_grid(kind, 8, schedule, whole=False)[0])
    assert first.sigma / first.alpha == pytest.approx(np.exp(5.1), rel=1e-6)


def test_points_between_timesteps_are_interpolated() -> None:
    flow = point_at(flow_schedule(11), 2.5)
    assert flow == pytest.approx((2.5, 0.75, 0.25))
    between = point_at(LINEAR, 500.5)
    assert LINEAR.sigmas[500] < between.sigma < LINEAR.sigmas[501]
    assert between.alpha**2 + between.sigma**2 == pytest.approx(1.0, abs=2e-5)


def test_a_trajectory_ends_clean() -> None:
    points = trajectory(COSINE, (999.0, 500.0))
    assert len(points) == 3 and points[-1][1:] == (1.0, 0.0)


def test_a_flow_runs_from_data_to_pure_noise() -> None:
    flow = flow_schedule(1000)
    assert (flow.alphas[0], flow.sigmas[0], flow.alphas[-1], flow.sigmas[-1]) == (1.0, 0.0, 0.0, 1.0)


def test_a_trajectory_may_end_at_the_noise_of_a_timestep() -> None:
    assert trajectory(COSINE, (999.0, 500.0), end=0.0)[-1] == point_at(COSINE, 0.0)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_lcm_grid_is_a_part_of_the_50_timesteps_taught(steps: int) -> None:
    assert {t % 20 for t in timestep_grid("lcm", steps, LINEAR)} == {19.0}


def test_more_steps_than_a_consistency_model_was_taught_are_refused() -> None:
    with pytest.raises(BadInput, match="51 steps: .* taught 50 timesteps"):
        timestep_grid("lcm", 51, LINEAR)


def test_a_spacing_adds_its_offset_and_rounds_where_it_says_so() -> None:
    assert spaced_timesteps(Spacing("leading", offset=1), 4, LINEAR) == (751.0, 501.0, 251.0, 1.0)
    assert spaced_timesteps(Spacing("linspace"), 3, LINEAR) == (999.0, 500.0, 0.0)
    assert spaced_timesteps(Spacing("linspace", whole=False), 3, LINEAR) == (999.0, 499.5, 0.0)


def test_a_shift_moves_a_flow_towards_the_noise() -> None:
    plain = Spacing("flow_trailing", whole=False)
    assert spaced_timesteps(plain, 4, FLOW) == (1000.0, 750.0, 500.0, 250.0)
    shifted = spaced_timesteps(replace(plain, shift=3.0), 4, FLOW)
    assert shifted == pytest.approx((1000.0, 900.0, 750.0, 500.0))  # 3 s / (1 + 2 s)


def test_a_dynamic_shift_is_read_off_the_line_between_two_sizes() -> None:
    spacing = Spacing("flow_trailing", whole=False, dynamic=(0.0, np.log(9.0), 100, 300))
    at = [spaced_timesteps(spacing, 4, FLOW, tokens)[2] for tokens in (100, 200, 300)]
    assert at == pytest.approx([500.0, 750.0, 900.0])  # k = 1, 3, 9
    assert reshifted((500.0,), spacing, 100, 300, FLOW) == pytest.approx((900.0,))
    assert reshifted(reshifted((321.0,), spacing, 100, 300, FLOW), spacing, 300, 100, FLOW) == pytest.approx((321.0,))


@pytest.mark.parametrize(("dynamic", "tokens"), [((0.5, 1.15, 256, 4096), None), ((0.5, 1.15, 256, 256), 256)])
def test_a_dynamic_shift_without_its_sizes_is_refused(dynamic, tokens) -> None:
    with pytest.raises(BadInput, match="number of image tokens"):
        spaced_timesteps(Spacing("flow_trailing", whole=False, dynamic=dynamic), 4, FLOW, tokens)


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_impossible_step_counts_are_refused(steps: int) -> None:
    with pytest.raises(BadInput, match="ask for 1 to 1000"):
        make_plan("ddim", steps, COSINE)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: timestep_grid("trailin", 3, COSINE), "did you mean 'trailing'"),
        (lambda: betas_schedule("cosine"), "unknown beta schedule 'cosine'"),
        (lambda: betas_schedule("linear", 1000, 0.02, 1e-4), "0 < start <= end < 1"),
        (lambda: point_at(COSINE, 999.5), "outside the model's 0..999"),
        (lambda: flow_schedule(1), "at least 2"),
    ],
)
def test_bad_schedule_input_is_refused(call, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        call()
