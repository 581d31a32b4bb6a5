"""runtime/image_inputs/start.py and the sampler: start at a noise level of the plan, and keep what a mask keeps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from diffpress.runtime.image_inputs.start import ENCODER_STREAM, ImageStart
from diffpress.runtime.noise_schedule import NoiseLevel, betas_schedule
from diffpress.runtime.sampler import Step, generate, generate_batches, noise_for, sample
from diffpress.runtime.sampling_plan import make_plan, plan_steps
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork, Gaussian

SCHEDULE = betas_schedule("scaled_linear", 1000, 0.00085, 0.012)
CLEAN = np.random.default_rng(0).standard_normal((2, 3, 4, 4)).astype(np.float32)
NOISE = np.random.default_rng(1).standard_normal((2, 3, 4, 4)).astype(np.float32)
MASK = np.zeros((2, 1, 4, 4), np.float32)
MASK[:, :, :, 2:] = 1.0


def perfect(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
    """Return the image, whatever the sample is."""
    return CLEAN


@pytest.mark.parametrize("solver", sorted(set(SOLVERS) - {"pndm", "pndm_v"}))
def test_every_solver_that_starts_from_an_image_returns_to_it_with_a_perfect_denoiser(solver: str) -> None:
    plan = make_plan(solver, 6, SCHEDULE, clip=False)
    start = ImageStart(CLEAN, None, first=3)
    steps = list(sample(perfect, NOISE, SCHEDULE, plan, lambda k: NOISE, start))
    assert [step.index for step in steps] == [3, 4, 5]
    if solver not in ("lcm", "ddim_clip", "plms_v"):  # these mix x into x_0, clip x_0, and extrapolate v
        assert np.abs(steps[-1].x - CLEAN).max() < 1e-4


def test_sampling_starts_at_the_level_of_the_first_step() -> None:
    plan = make_plan("ddim", 5, SCHEDULE, clip=False)
    seen: list[tuple[np.ndarray, NoiseLevel]] = []

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        seen.append((x, level))
        return x

    list(sample(denoise, NOISE, SCHEDULE, plan, image=ImageStart(CLEAN, None, first=2)))
    x, level = seen[0]
    assert level == plan_steps(SCHEDULE, plan)[2][0] and len(seen) == 3
    np.testing.assert_allclose(x, level.alpha * CLEAN + level.sigma * NOISE, rtol=1e-5)


def test_what_a_mask_keeps_is_the_noised_image_after_every_step_and_the_image_at_the_end() -> None:
    # the steps of this plan end elsewhere: 150 timesteps lower, and at a level that is not clean
    plan = replace(make_plan("ddim", 5, SCHEDULE, clip=False, end=10.0), stride=150)
    start = ImageStart(CLEAN, None, first=1, mask=MASK)
    steps = list(sample(lambda x, level: 0.5 * x, NOISE, SCHEDULE, plan, image=start))
    levels = [now for now, _ in plan_steps(SCHEDULE, plan)][2:]
    for step, level in zip(steps[:-1], levels, strict=True):
        expected = level.alpha * CLEAN + level.sigma * NOISE
        np.testing.assert_allclose(step.x[..., :2], expected[..., :2], rtol=1e-5)
        assert np.abs(step.x[..., 2:] - expected[..., 2:]).min() > 1e-4
    assert np.array_equal(steps[-1].x[..., :2], CLEAN[..., :2])


def test_with_full_strength_a_masked_image_starts_from_noise_alone() -> None:
    plan = make_plan("ddim", 3, SCHEDULE, clip=False)
    first: list[np.ndarray] = []

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        first.append(x)
        return x

    list(sample(denoise, NOISE, SCHEDULE, plan, image=ImageStart(CLEAN, None, 0, MASK, from_noise=True)))
    list(sample(denoise, NOISE, SCHEDULE, plan))
    assert np.array_equal(first[0], first[3])


def spec_and_network() -> tuple[DenoiserSpec, FakeNetwork]:
    plan = make_plan("ddim", 6, SCHEDULE, clip=False)
    return DenoiserSpec("epsilon", SCHEDULE, (3, 4, 4), plan), FakeNetwork("epsilon", SCHEDULE, Gaussian().denoise)


def test_a_sample_depends_on_its_seed_and_image_alone() -> None:
    spec, network = spec_and_network()
    rng = np.random.default_rng(2)
    clean, std = (rng.random((5, 3, 4, 4)).astype(np.float32) for _ in range(2))
    start = ImageStart(clean, std, first=2)
    together = generate(network, spec, range(5), batch=5, image=start)
    alone = [generate(network, spec, [k], image=start.part(slice(k, k + 1))) for k in range(5)]
    np.testing.assert_allclose(np.concatenate(alone), together, atol=1e-6)
    np.testing.assert_allclose(generate(network, spec, range(5), batch=2, image=start), together, atol=1e-6)


def test_the_noise_of_the_encoder_is_that_of_the_seed() -> None:
    spec, network = spec_and_network()
    drawn = CLEAN + 0.5 * noise_for([7, 8], (3, 4, 4), ENCODER_STREAM)
    found = generate(network, spec, [7, 8], image=ImageStart(CLEAN, np.full_like(CLEAN, 0.5), first=2))
    np.testing.assert_allclose(
        found, generate(network, spec, [7, 8], image=ImageStart(drawn, None, first=2)), atol=1e-6
    )
    assert not np.allclose(noise_for([7], (9,), ENCODER_STREAM), noise_for([7], (9,)))


def test_a_callback_sees_the_steps_that_are_run_and_does_not_change_the_samples() -> None:
    spec, network = spec_and_network()
    start, seen = ImageStart(CLEAN, None, first=4, mask=MASK), []

    def note(step: Step) -> None:
        seen.append(step.index)

    noted = list(generate_batches(network, spec, [0, 1], on_step=note, image=start))
    assert seen == [4, 5] and np.array_equal(np.concatenate(noted), generate(network, spec, [0, 1], image=start))


def test_the_pixels_that_a_mask_keeps_replace_those_of_the_finished_image() -> None:
    images, pixels = np.zeros((2, 3, 4, 4), np.float32), np.ones((2, 3, 4, 4), np.float32)
    assert ImageStart(CLEAN, None, 0).overlaid(images) is images
    found = ImageStart(CLEAN, None, 0, MASK, pixels=pixels, keep=MASK == 0).overlaid(images)
    assert np.array_equal(found, np.broadcast_to(1 - MASK, found.shape))
