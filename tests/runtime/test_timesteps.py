"""runtime/timesteps.py against diffusers' own and against the formulas it states."""

from __future__ import annotations

import numpy as np
import pytest

from diffpress.runtime.errors import BadInput
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule, point_at
from diffpress.runtime.timesteps import AYS, GRIDS, beta_quantile, timestep_grid

COSINE = betas_schedule("squaredcos_cap_v2", 1000)
LINEAR = betas_schedule("linear", 1000)
LATENT = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 16, 50, 999, 1000])
def test_plain_grids_equal_those_of_diffusers(kind: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=kind, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert timestep_grid(kind, steps, LINEAR) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("kind", "option"),
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas")],
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


@pytest.mark.parametrize("kind", sorted(set(GRIDS) - {"leading", "dpm_leading", *AYS}))
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


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_the_lcm_grid_is_a_part_of_the_50_timesteps_taught(steps: int) -> None:
    assert {t % 20 for t in timestep_grid("lcm", steps, LINEAR)} == {19.0}


def test_more_steps_than_a_consistency_model_was_taught_are_refused() -> None:
    with pytest.raises(BadInput, match="51 steps: .* taught 50 timesteps"):
        timestep_grid("lcm", 51, LINEAR)


def test_quantiles_of_the_beta_distribution_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = np.concatenate([np.linspace(0.0, 1.0, 101), [1e-4, 1e-3, 0.999]])
    assert np.abs(beta_quantile(p) - stats.beta.ppf(p, 0.6, 0.6)).max() < 1e-7


@pytest.mark.parametrize(
    ("grid", "theirs"), [("ays_sd15", "StableDiffusionTimesteps"), ("ays_sdxl", "StableDiffusionXLTimesteps")]
)
def test_ten_aligned_steps_are_the_published_ones(grid: str, theirs: str) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    published = np.array(schedulers.AysSchedules[theirs])
    # their timesteps and their noise levels, which ours are made of, agree to a timestep or two
    assert np.abs(np.array(timestep_grid(grid, 10, LATENT)) - published).max() <= 2
    levels = schedulers.AysSchedules[theirs.replace("Timesteps", "Sigmas")]
    points = [point_at(LATENT, t) for t in timestep_grid(grid, 10, LATENT, whole=False)]
    assert np.allclose([point.sigma / point.alpha for point in points], levels[:-1], rtol=1e-3)
    assert AYS["ays_svd"] == tuple(schedulers.AysSchedules["StableDiffusionVideoSigmas"][:-1])


def test_other_numbers_of_aligned_steps_lie_between_in_log_ratio() -> None:
    points = [point_at(LATENT, t) for t in timestep_grid("ays_sd15", 19, LATENT, whole=False)]
    ratios = np.array([point.sigma / point.alpha for point in points])
    # the first lies a hair beyond the end of the table
    assert np.allclose(ratios[3::2] ** 2, ratios[2:-1:2] * ratios[4::2], rtol=1e-6)
