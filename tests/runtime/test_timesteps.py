"""runtime/timesteps.py against diffusers and its own formulas."""

from __future__ import annotations

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import NoiseSchedule, betas_schedule, flow_schedule, noise_level_at
from diffpress.runtime.sigma_spacing import beta_quantile
from diffpress.runtime.timesteps import AYS, SPACINGS, timesteps_for

COSINE = betas_schedule("squaredcos_cap_v2", 1000)
LINEAR = betas_schedule("linear", 1000)
LATENT = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)


@pytest.mark.parametrize("kind", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("steps", [2, 3, 7, 16, 50, 999, 1000])
def test_plain_spacings_match_diffusers(kind: str, steps: int) -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=kind, steps_offset=0)
    scheduler.set_timesteps(steps)
    assert timesteps_for(kind, steps, LINEAR) == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize(
    ("kind", "option"),
    [("karras", "use_karras_sigmas"), ("exponential", "use_exponential_sigmas"), ("beta", "use_beta_sigmas")],
)
def test_sigma_spacings_visit_the_noise_levels_of_diffusers(kind: str, option: str) -> None:
    diffusers = pytest.importorskip("diffusers")
    pytest.importorskip("scipy")
    scheduler = diffusers.EulerDiscreteScheduler(1000, timestep_spacing="linspace", **{option: True})
    scheduler.set_timesteps(12)
    levels = [noise_level_at(LINEAR, t) for t in timesteps_for(kind, 12, LINEAR, integer=False)]
    ratios = np.array([level.sigma / level.alpha for level in levels])
    assert np.allclose(ratios, scheduler.sigmas.numpy()[:-1], rtol=1e-4)


@pytest.mark.parametrize("kind", sorted(set(SPACINGS) - {"lcm"}))  # lcm has 50 timesteps only
@pytest.mark.parametrize("steps", [1, 2, 5, 37, 999, 1000])
@pytest.mark.parametrize("schedule", [COSINE, LINEAR, flow_schedule(1000)], ids=["cosine", "linear", "flow"])
def test_every_spacing_gives_that_many_descending_integer_timesteps(
    kind: str, steps: int, schedule: NoiseSchedule
) -> None:
    t = np.array(timesteps_for(kind, steps, schedule))
    assert len(t) == steps and (np.diff(t) <= -1).all() and t[0] <= 999 and t[-1] >= 0 and (t == np.round(t)).all()


@pytest.mark.parametrize("kind", sorted(set(SPACINGS) - {"leading", "dpm_leading", *AYS}))
def test_a_single_step_starts_at_the_noisy_end(kind: str) -> None:
    assert timesteps_for(kind, 1, COSINE)[0] >= 990


def test_quad_spacing_follows_its_formula() -> None:
    assert timesteps_for("quad", 4, LINEAR) == (999.0, 444.0, 111.0, 0.0)


def test_logsnr_spacing_is_uniform_in_log_snr() -> None:
    levels = [noise_level_at(COSINE, t) for t in timesteps_for("logsnr", 9, COSINE, integer=False)]
    steps = np.diff([np.log(level.alpha / level.sigma) for level in levels])
    assert np.allclose(steps, steps[0], rtol=1e-9)


@pytest.mark.parametrize("kind", ["karras", "logsnr"])
@pytest.mark.parametrize("schedule", [COSINE, flow_schedule(1000)], ids=["cosine", "flow"])
def test_karras_and_logsnr_spacings_start_at_the_highest_useful_ratio(kind: str, schedule: NoiseSchedule) -> None:
    first = noise_level_at(schedule, timesteps_for(kind, 8, schedule, integer=False)[0])
    assert first.sigma / first.alpha == pytest.approx(np.exp(5.1), rel=1e-6)


@pytest.mark.parametrize("steps", [1, 4, 50])
def test_lcm_spacing_is_a_subset_of_the_50_training_timesteps(steps: int) -> None:
    assert {t % 20 for t in timesteps_for("lcm", steps, LINEAR)} == {19.0}


def test_more_steps_than_a_consistency_model_was_trained_on_are_refused() -> None:
    with pytest.raises(InvalidInputError, match=r"51 steps: .* trained on 50 timesteps"):
        timesteps_for("lcm", 51, LINEAR)


def test_beta_quantiles_match_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    p = np.concatenate([np.linspace(0.0, 1.0, 101), [1e-4, 1e-3, 0.999]])
    assert np.abs(beta_quantile(p) - stats.beta.ppf(p, 0.6, 0.6)).max() < 1e-7


@pytest.mark.parametrize(
    ("kind", "theirs"), [("ays_sd15", "StableDiffusionTimesteps"), ("ays_sdxl", "StableDiffusionXLTimesteps")]
)
def test_ten_aligned_steps_match_the_published_ones(kind: str, theirs: str) -> None:
    schedulers = pytest.importorskip("diffusers.schedulers")
    published = np.array(schedulers.AysSchedules[theirs])
    # ours are made from the published noise levels, which match the published timesteps to one or two
    assert np.abs(np.array(timesteps_for(kind, 10, LATENT)) - published).max() <= 2
    ratios = schedulers.AysSchedules[theirs.replace("Timesteps", "Sigmas")]
    levels = [noise_level_at(LATENT, t) for t in timesteps_for(kind, 10, LATENT, integer=False)]
    assert np.allclose([level.sigma / level.alpha for level in levels], ratios[:-1], rtol=1e-3)
    assert AYS["ays_svd"] == tuple(schedulers.AysSchedules["StableDiffusionVideoSigmas"][:-1])


def test_other_numbers_of_aligned_steps_are_interpolated_in_log_ratio() -> None:
    levels = [noise_level_at(LATENT, t) for t in timesteps_for("ays_sd15", 19, LATENT, integer=False)]
    ratios = np.array([level.sigma / level.alpha for level in levels])
    # the first is slightly beyond the end of the table
    assert np.allclose(ratios[3::2] ** 2, ratios[2:-1:2] * ratios[4::2], rtol=1e-6)
