"""runtime/denoise.py: predictions all lead to the same x_0, guidance equals two calls, misfits are refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from runtime.denoise import make_denoiser, network_inputs, to_x0
from runtime.errors import BadInput
from runtime.schedule import Point, betas_schedule, flow_schedule, make_plan, point_at
from runtime.spec import Conditioning, DenoiserSpec, NoiseSchedule

COSINE = betas_schedule("squaredcos_cap_v2", 100)
CLASSES = Conditioning("class", classes=10, null_label=10)


def spec_of(
    prediction: str, schedule: NoiseSchedule = COSINE, conditioning: Conditioning | None = None
) -> DenoiserSpec:
    plan = make_plan("ddim", 4, schedule)
    return DenoiserSpec(prediction, schedule, (1, 4, 4), plan, conditioning or Conditioning())


@pytest.mark.parametrize(
    ("prediction", "schedule"),
    [
        ("epsilon", COSINE),
        ("v", COSINE),
        ("sample", COSINE),
        ("flow", flow_schedule(100)),
        ("flow", COSINE),
        ("v", flow_schedule(100)),
    ],
)
@pytest.mark.parametrize("t", [1, 50, 90])
def test_every_prediction_is_translated_to_x0(fake_network, mixture, noise, prediction, schedule, t) -> None:
    network = fake_network(prediction, schedule)
    x, point = noise(3, 1, 4, 4), point_at(schedule, t)
    x0 = make_denoiser(network, spec_of(prediction, schedule), clip=False)(x, point)
    # float32 rounding of the network's answer, blown up by the division by alpha
    assert np.abs(x0 - mixture.denoise(x, point)).max() < 1e-6 * (1 + point.sigma / max(point.alpha, 0.01))
    assert x0.dtype == np.float32


def test_epsilon_near_pure_noise_stays_finite_and_clipped(fake_network, noise) -> None:
    schedule = betas_schedule("squaredcos_cap_v2", 1000)
    network = fake_network("epsilon", schedule, oracle=lambda x, point: x * 100)
    with np.errstate(over="raise", invalid="raise"):
        x0 = make_denoiser(network, spec_of("epsilon", schedule))(noise(2, 1, 4, 4), point_at(schedule, 999))
    assert np.abs(x0).max() == 1.0


def test_epsilon_at_pure_noise_is_refused(noise) -> None:
    with pytest.raises(BadInput, match="start the plan at an earlier timestep"):
        to_x0("epsilon", noise(4), noise(4), Point(99.0, 0.0, 1.0))


def test_clipping_follows_the_data_range(fake_network, noise) -> None:
    network = fake_network("sample", COSINE, oracle=lambda x, point: x * 100)
    spec = replace(spec_of("sample"), data_range=(0.0, 0.5))
    point = point_at(COSINE, 50)
    clipped = make_denoiser(network, spec)(noise(2, 1, 4, 4), point)
    assert (clipped.min(), clipped.max()) == (0.0, 0.5)
    assert np.abs(make_denoiser(network, spec, clip=False)(noise(2, 1, 4, 4), point)).max() > 100


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_guidance_equals_two_separate_calls(fake_network, noise, prediction) -> None:
    spec = spec_of(prediction, conditioning=CLASSES)
    x, point, labels = noise(3, 1, 4, 4), point_at(COSINE, 40), np.array([1, 7, 4])
    network = fake_network(prediction, COSINE, labelled=True)

    def alone(these: np.ndarray) -> np.ndarray:
        return make_denoiser(network, spec, labels=these, clip=False)(x, point)

    null = alone(np.full(3, 10))
    expected = null + 2.5 * (alone(labels) - null)
    guided_network = fake_network(prediction, COSINE, labelled=True)
    guided = make_denoiser(guided_network, spec, labels=labels, guidance=2.5, clip=False)(x, point)
    assert np.abs(guided - expected).max() < 1e-5
    assert len(guided_network.calls) == 1
    assert guided_network.calls[0]["class_labels"].tolist() == [1, 7, 4, 10, 10, 10]


def test_guidance_one_costs_one_half(fake_network, noise) -> None:
    network = fake_network("v", COSINE, labelled=True)
    labels = np.array([1, 2, 3])
    make_denoiser(network, spec_of("v", conditioning=CLASSES), labels=labels)(noise(3, 1, 4, 4), point_at(COSINE, 40))
    assert len(network.calls[0]["sample"]) == 3


@pytest.mark.parametrize(("kind", "told"), [(np.int64, 50), (np.float32, 50.4)])
def test_the_timestep_is_told_in_the_type_of_the_graph(fake_network, noise, kind, told) -> None:
    network = fake_network("v", COSINE, timestep_type=np.dtype(kind))
    make_denoiser(network, spec_of("v"))(noise(2, 1, 4, 4), point_at(COSINE, 50.4))
    timestep = network.calls[0]["timestep"]
    assert timestep.dtype == kind and timestep.shape == (2,) and timestep[0] == pytest.approx(told)


def test_example_inputs_are_those_of_the_first_call(fake_network) -> None:
    spec = spec_of("v", conditioning=CLASSES)
    network = fake_network("v", COSINE, labelled=True)
    plain = network_inputs(network, spec, 3)
    guided = network_inputs(network, spec.with_plan(replace(spec.plan, guidance=2.0)), 3)
    assert plain["sample"].shape == (3, 1, 4, 4) and guided["sample"].shape == (6, 1, 4, 4)
    assert plain["timestep"].tolist() == [99, 99, 99] and plain["class_labels"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("conditioning", "labelled", "options", "message"),
    [
        (CLASSES, True, {}, "one label of 0..9 per sample"),
        (CLASSES, True, {"labels": np.array([11])}, "not among 0..9"),
        (CLASSES, True, {"labels": np.array([-1])}, "not among 0..9"),
        (CLASSES, True, {"labels": np.array([1.5])}, "float64"),
        (Conditioning("class", 10), True, {"labels": np.array([1]), "guidance": 2.0}, "needs a null label"),
        (Conditioning(), False, {"labels": np.array([1])}, "not class-conditional"),
        (Conditioning(), False, {"guidance": 2.0}, "not class-conditional"),
        (Conditioning("text"), False, {}, "text"),
        (Conditioning(), True, {}, "inputs are class_labels, sample, timestep; by its spec"),
        (CLASSES, False, {"labels": np.array([1])}, "by its spec they should be class_labels"),
    ],
)
def test_wishes_that_do_not_fit_the_model_are_refused(fake_network, conditioning, labelled, options, message) -> None:
    network = fake_network("v", COSINE, labelled=labelled)
    with pytest.raises(BadInput, match=message):
        make_denoiser(network, spec_of("v", conditioning=conditioning), **options)
