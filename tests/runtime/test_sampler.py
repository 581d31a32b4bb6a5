"""runtime/sampler.py: every step is yielded, and an image depends on its seed, label and plan only."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, betas_schedule, flow_schedule
from diffpress.runtime.sampler import MAX_SEED, cycled_labels, generate, generate_batches, noise_for, sample
from diffpress.runtime.sampling_plan import OutputCorrection, SamplingPlan, make_plan
from diffpress.runtime.solvers import SOLVERS
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import Distorted, FakeNetwork, Mixture

COSINE = betas_schedule("squaredcos_cap_v2", 100)
PLAN = make_plan("dpmpp_2m", 5, COSINE)


def spec_of(plan: SamplingPlan = PLAN, classes: int = 0) -> DenoiserSpec:
    conditioning = Conditioning("class", classes, null_label=classes) if classes else Conditioning()
    return DenoiserSpec("v", COSINE, (2, 4, 4), plan, conditioning)


def test_every_step_is_yielded_with_its_timestep_and_its_x0(mixture: Mixture, noise: Callable[..., np.ndarray]) -> None:
    seen = []

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        seen.append(x)
        return mixture.denoise(x, level)

    steps = list(sample(denoise, noise(3, 2, 4, 4), COSINE, PLAN))
    assert [step.index for step in steps] == [0, 1, 2, 3, 4]
    assert tuple(step.t for step in steps) == PLAN.timesteps
    assert all(after is step.x for step, after in zip(steps, seen[1:], strict=False))
    assert np.abs(steps[-1].x - steps[-1].x0).max() < 1e-12


def test_steps_are_computed_lazily(mixture: Mixture, noise: Callable[..., np.ndarray]) -> None:
    calls = []

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        calls.append(level)
        return mixture.denoise(x, level)

    steps = sample(denoise, noise(1, 2, 4, 4), COSINE, PLAN)
    next(steps)
    assert len(calls) == 1


def test_the_initial_noise_has_the_standard_deviation_of_the_schedule(noise: Callable[..., np.ndarray]) -> None:
    ratios = tuple(np.linspace(0.01, 80.0, 10))
    exploding = NoiseSchedule((1.0,) * 10, ratios)
    seen = []

    def denoise(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        seen.append(x)
        return x

    list(sample(denoise, noise(1, 1, 4, 4), exploding, SamplingPlan("ddim", (9.0,))))
    assert np.allclose(seen[0], noise(1, 1, 4, 4) * np.hypot(1, 80.0))


@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize("solver", SOLVERS)
def test_an_image_does_not_depend_on_its_batch(fake_network: type[FakeNetwork], solver: str, eta: float) -> None:
    network = fake_network("v", COSINE, labelled=True)
    spec = spec_of(replace(PLAN, solver=solver, eta=eta), classes=3)
    together = generate(network, spec, range(7), batch=7)
    batched = generate(network, spec, range(7), batch=3)
    alone = generate(network, spec, [5], labels=[2])
    assert together.shape == (7, 2, 4, 4) and together.dtype == np.float32
    assert np.array_equal(together, batched) and np.array_equal(together[5:6], alone)


def test_seeds_and_labels_determine_the_image(fake_network: type[FakeNetwork]) -> None:
    network, spec = fake_network("v", COSINE, labelled=True), spec_of(classes=3)
    first, again, other_seed = generate(network, spec, [4, 4, 5], labels=[0, 0, 0])
    other_label = generate(network, spec, [4], labels=[1])[0]
    assert np.array_equal(first, again)
    assert np.abs(first - other_seed).max() > 0.1 and np.abs(first - other_label).max() > 0.01


def test_sampling_with_eta_is_reproducible_and_changes_the_image(fake_network: type[FakeNetwork]) -> None:
    network = fake_network("v", COSINE)
    noisy = spec_of(replace(PLAN, solver="ddim", eta=1.0))
    assert np.array_equal(generate(network, noisy, [3]), generate(network, noisy, [3]))
    still = generate(network, spec_of(replace(PLAN, solver="ddim")), [3])
    assert np.abs(generate(network, noisy, [3]) - still).max() > 0.05


@pytest.mark.parametrize(("solver", "eta", "named"), [("ddim", 0.5, "eta above 0"), ("lcm", 0.0, "stochastic solver")])
def test_fresh_noise_without_a_source_is_refused(
    mixture: Mixture, noise: Callable[..., np.ndarray], solver: str, eta: float, named: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"{named}.*pass fresh_noise"):
        list(sample(mixture.denoise, noise(1, 2, 4, 4), COSINE, replace(PLAN, solver=solver, eta=eta)))


def test_noise_is_normal_and_streams_are_independent() -> None:
    start, later = noise_for(range(64), (3, 16, 16)), noise_for(range(64), (3, 16, 16), stream=1)
    n = start.size
    assert start.dtype == np.float32
    # five standard errors of a mean, a variance and a correlation of n independent normals
    assert abs(start.mean()) < 5 / n**0.5 and abs(start.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((start * later).mean()) < 5 / n**0.5
    assert abs((start[:-1] * start[1:]).mean()) < 5 / n**0.5


def test_the_noise_of_a_seed_never_changes() -> None:
    """Published images depend on these values: another generator would change all of them."""
    recorded = [[0.05991104, 0.01555963], [0.9518664, -1.0147828]]
    assert np.allclose(noise_for([0, MAX_SEED], (2,)), recorded, atol=1e-6)


def test_batches_are_yielded_one_by_one(fake_network: type[FakeNetwork]) -> None:
    network = fake_network("v", COSINE)
    batches = generate_batches(network, spec_of(), range(5), batch=2)
    assert len(next(batches)) == 2 and len(network.calls) == PLAN.steps
    assert [len(part) for part in batches] == [2, 1]


def test_classes_are_taken_in_turn() -> None:
    turn = cycled_labels(spec_of(classes=3), 5)
    assert turn is not None and turn.tolist() == [0, 1, 2, 0, 1]
    assert cycled_labels(spec_of(), 5) is None


def test_a_plan_argument_overrides_the_spec(fake_network: type[FakeNetwork]) -> None:
    network = fake_network("v", COSINE)
    generate(network, spec_of(), [0], plan=make_plan("ddim", 2, COSINE))
    assert len(network.calls) == 2


@pytest.mark.parametrize("clip", [True, False])
def test_images_stay_in_the_data_range_if_the_plan_clips(fake_network: type[FakeNetwork], clip: bool) -> None:
    network = fake_network("v", COSINE, oracle=lambda x, level: 3 * np.tanh(x))
    images = generate(network, spec_of(replace(PLAN, clip=clip)), range(4))
    assert (np.abs(images).max() <= 1.0) is np.bool_(clip)


def test_a_flow_model_samples_from_pure_noise(fake_network: type[FakeNetwork]) -> None:
    flow = flow_schedule(100)
    spec = DenoiserSpec("flow", flow, (1, 4, 4), make_plan("dpmpp_2m", 20, flow))
    images = generate(fake_network("flow", flow), spec, range(16))
    distance = np.abs(images[..., None] - np.array([-0.8, -0.1, 0.7])).min(axis=-1)
    assert distance.mean() < 0.2  # the mixture's modes have a deviation of 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": []}, "at least 1"),
        ({"seeds": [0], "batch": 0}, "at least 1"),
        ({"seeds": [-1]}, "seed -1"),
        ({"seeds": [0, 1], "labels": [1]}, "one label per seed"),
        (
            {"seeds": [0, 1], "conditions": ConditioningInputs({"class_labels": np.array([1])})},
            "conditions of 1 samples for 2 seeds",
        ),
        ({"seeds": [0], "labels": [1], "conditions": ConditioningInputs()}, "labels or conditions"),
        ({"seeds": [0], "plan": SamplingPlan("dim", (50.0,))}, "did you mean 'ddim'"),
        ({"seeds": [0], "plan": SamplingPlan("ddim", (500.0,))}, "timestep 500"),
    ],
)
def test_invalid_sampling_arguments_are_refused(
    fake_network: type[FakeNetwork], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError, match=message):
        generate(fake_network("v", COSINE), spec_of(), **options)


@pytest.mark.parametrize("solver", ["dpmpp_2m", "plms"])  # plms evaluates one timestep twice
@pytest.mark.parametrize("guidance", [1.0, 2.5])
def test_output_corrections_undo_a_known_error_of_the_network(
    solver: str, guidance: float, fake_network: type[FakeNetwork], distorted: type[Distorted]
) -> None:
    errors: dict[float, tuple[float, tuple[float, ...]]] = {
        t: (0.1 * k - 0.2, (0.3 - 0.1 * k, 0.05 * k)) for k, t in enumerate(PLAN.timesteps)
    }
    plan = replace(PLAN, solver=solver, guidance=guidance)
    wrong = distorted(fake_network("v", COSINE, labelled=True), errors)
    exact = generate(wrong.network, spec_of(plan, classes=4), range(3))
    output_corrections = tuple(OutputCorrection(*errors[t]) for t in plan.timesteps)
    without_corrections = generate(wrong, spec_of(plan, classes=4), range(3))
    right = generate(wrong, spec_of(replace(plan, output_corrections=output_corrections), classes=4), range(3))
    assert np.abs(without_corrections - exact).max() > 0.1 and right.dtype == np.float32
    np.testing.assert_allclose(right, exact, atol=1e-4)
