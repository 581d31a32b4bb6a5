"""runtime/denoiser.py: all predictions give the same x_0, guidance equals two evaluations, misfits are refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.conditioning import Conditioning, TextInput
from diffpress.runtime.denoiser import Denoise, corrected, make_denoiser, plan_denoiser, thresholded
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import Interval, evaluations_at, evaluations_per_step, rescaled
from diffpress.runtime.network_inputs import (
    ConditioningInputs,
    Network,
    class_conditioning,
    dummy_conditioning,
    dummy_inputs,
)
from diffpress.runtime.noise_schedule import NoiseLevel, NoiseSchedule, betas_schedule, flow_schedule, noise_level_at
from diffpress.runtime.sampling_plan import OutputCorrection, Threshold, make_plan
from diffpress.runtime.spec import DenoiserSpec
from tests.runtime.conftest import FakeNetwork, Mixture

COSINE = betas_schedule("squaredcos_cap_v2", 100)
CLASSES = Conditioning("class", classes=10, null_label=10)
TEXT_INPUTS = {
    "encoder_hidden_states": TextInput((5, 6), (("text_encoder.last_hidden_state",),)),
    "encoder_attention_mask": TextInput((5,), (("text_encoder.attention_mask",),)),
    "time_ids": TextInput((4,), (("size", "corner"),)),
}
TEXT = Conditioning("text", inputs=TEXT_INPUTS)


def spec_of(
    prediction: str, schedule: NoiseSchedule = COSINE, conditioning: Conditioning | None = None
) -> DenoiserSpec:
    plan = make_plan("ddim", 4, schedule)
    return DenoiserSpec(prediction, schedule, (1, 4, 4), plan, conditioning or Conditioning())


def labelled_denoiser(network: Network, spec: DenoiserSpec, labels: np.ndarray | None, **options: Any) -> Denoise:
    return make_denoiser(network, spec, conditions=class_conditioning(spec, labels), **options)


def text_inputs(*samples: float) -> dict[str, np.ndarray]:
    """Return text inputs with one sample per value, filled with it."""
    return {
        name: np.stack([np.full(form.shape, value, np.float32) for value in samples])
        for name, form in TEXT_INPUTS.items()
    }


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
def test_every_prediction_is_converted_to_x0(
    fake_network: type[FakeNetwork],
    mixture: Mixture,
    noise: Callable[..., np.ndarray],
    prediction: str,
    schedule: NoiseSchedule,
    t: float,
) -> None:
    network = fake_network(prediction, schedule)
    x, level = noise(3, 1, 4, 4), noise_level_at(schedule, t)
    x0 = make_denoiser(network, spec_of(prediction, schedule), clip=False)(x, level)
    # float32 rounding error of the network's output, amplified by the division by alpha
    assert np.abs(x0 - mixture.denoise(x, level)).max() < 1e-6 * (1 + level.sigma / max(level.alpha, 0.01))
    assert x0.dtype == np.float32


def test_epsilon_near_pure_noise_stays_finite_and_clipped(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]
) -> None:
    schedule = betas_schedule("squaredcos_cap_v2", 1000)
    network = fake_network("epsilon", schedule, oracle=lambda x, level: x * 100)
    with np.errstate(over="raise", invalid="raise"):
        x0 = make_denoiser(network, spec_of("epsilon", schedule))(noise(2, 1, 4, 4), noise_level_at(schedule, 999))
    assert np.abs(x0).max() == 1.0


def test_clipping_follows_the_data_range(fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]) -> None:
    network = fake_network("sample", COSINE, oracle=lambda x, level: x * 100)
    spec = replace(spec_of("sample"), data_range=(0.0, 0.5))
    level = noise_level_at(COSINE, 50)
    clipped = make_denoiser(network, spec)(noise(2, 1, 4, 4), level)
    assert (clipped.min(), clipped.max()) == (0.0, 0.5)
    assert np.abs(make_denoiser(network, spec, clip=False)(noise(2, 1, 4, 4), level)).max() > 100


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
def test_guidance_equals_two_separate_evaluations(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], prediction: str
) -> None:
    spec = spec_of(prediction, conditioning=CLASSES)
    x, level, labels = noise(3, 1, 4, 4), noise_level_at(COSINE, 40), np.array([1, 7, 4])
    network = fake_network(prediction, COSINE, labelled=True)

    def alone(these: np.ndarray) -> np.ndarray:
        return labelled_denoiser(network, spec, these, clip=False)(x, level)

    uncond = alone(np.full(3, 10))
    expected = uncond + 2.5 * (alone(labels) - uncond)
    guided_network = fake_network(prediction, COSINE, labelled=True)
    guided = labelled_denoiser(guided_network, spec, labels, guidance=2.5, clip=False)(x, level)
    assert np.abs(guided - expected).max() < 1e-5
    assert len(guided_network.calls) == 1
    assert guided_network.calls[0]["class_labels"].tolist() == [1, 7, 4, 10, 10, 10]


@pytest.mark.parametrize(("interval", "acts"), [((0.5, 2.0), True), ((2.0, None), False), ((0.1, 0.9), False)])
def test_outside_its_interval_guidance_evaluates_the_cond_half_only(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], interval: Interval, acts: bool
) -> None:
    spec, labels, x = spec_of("v", conditioning=CLASSES), np.array([1, 7, 4]), noise(3, 1, 4, 4)
    level = NoiseLevel(50.0, 0.7, 0.7)  # sigma / alpha = 1
    network = fake_network("v", COSINE, labelled=True)
    found = labelled_denoiser(network, spec, labels, guidance=2.5, clip=False, interval=interval)(x, level)
    alone = labelled_denoiser(fake_network("v", COSINE, labelled=True), spec, labels, clip=False)(x, level)
    guided = labelled_denoiser(network, spec, labels, guidance=2.5, clip=False)(x, level)
    assert np.array_equal(found, guided if acts else alone)
    assert len(network.calls) == 2 and len(network.calls[0]["sample"]) == (6 if acts else 3)
    plan = replace(spec.plan, guidance=2.5, guidance_interval=interval)
    assert evaluations_at(spec.with_plan(plan), level) == (2 if acts else 1)


def test_a_guidance_input_is_one_outside_its_interval(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]
) -> None:
    spec = spec_of("v", conditioning=replace(TEXT, guidance_input=True))
    network = fake_network("v", COSINE, cond=(*TEXT_INPUTS, "guidance"))
    denoise = make_denoiser(
        network, spec, conditions=ConditioningInputs(text_inputs(1.0)), guidance=3.5, interval=(0.5, 2.0)
    )
    for sigma in (0.7, 0.1):
        denoise(noise(1, 1, 4, 4), NoiseLevel(50.0, 0.7, sigma))
    assert [call["guidance"].tolist() for call in network.calls] == [[3.5], [1.0]]


def test_guidance_is_rescaled_as_in_diffusers(noise: Callable[..., np.ndarray]) -> None:
    torch = pytest.importorskip("torch")
    pipeline = pytest.importorskip("diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion")
    label = noise(3, 4, 8, 8)
    mixed = 3 * label + noise(6, 4, 8, 8)[3:]
    for phi in (0.0, 0.7, 1.0):
        theirs = pipeline.rescale_noise_cfg(torch.from_numpy(mixed), torch.from_numpy(label), guidance_rescale=phi)
        assert np.abs(rescaled(mixed, label, phi) - theirs.numpy()).max() < 1e-5


def test_the_denoiser_rescales_guidance(fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]) -> None:
    spec, labels, level = spec_of("sample", conditioning=CLASSES), np.array([1, 7]), noise_level_at(COSINE, 40)
    network, x = fake_network("sample", COSINE, labelled=True), noise(2, 1, 4, 4)
    plan = replace(spec.plan, guidance=4.0, guidance_rescale=1.0, clip=False)
    cond = class_conditioning(spec, labels)
    found = plan_denoiser(network, spec.with_plan(plan), cond)(x, level)
    alone = plan_denoiser(network, spec.with_plan(replace(plan, guidance=1.0)), cond)(x, level)
    assert np.allclose(found.std(axis=(1, 2, 3)), alone.std(axis=(1, 2, 3)), rtol=1e-5)


@pytest.mark.parametrize(("low", "high"), [(-1.0, 1.0), (0.0, 1.0)])
def test_dynamic_thresholding_stays_in_the_data_range(
    noise: Callable[..., np.ndarray], low: float, high: float
) -> None:
    x0 = (high - low) / 2 * 3 * noise(4, 2, 8, 8) + (low + high) / 2
    bounded = thresholded(x0, Threshold(0.9), (low, high))
    assert bounded.dtype == np.float32 and bounded.min() >= low - 1e-6 and bounded.max() <= high + 1e-6
    # in each sample a tenth of the values is at the ends
    ends = (np.abs(bounded - (low + high) / 2) > (high - low) / 2 - 1e-6).mean(axis=(1, 2, 3))
    assert np.abs(ends - 0.1).max() < 0.02
    small = (high - low) / 2 * 0.2 * np.tanh(noise(4, 2, 8, 8)) + (low + high) / 2
    assert np.abs(thresholded(small, Threshold(0.9), (low, high)) - small).max() < 1e-6


def test_evaluating_a_timestep_that_was_not_exported_is_refused(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]
) -> None:
    spec = spec_of("v")
    spec = replace(spec, fixed_timesteps=spec.plan.timesteps)
    with pytest.raises(InvalidInputError, match=r"timestep 41\.5 is not one of the 4 .* use another solver"):
        make_denoiser(fake_network("v", COSINE), spec)(noise(1, 1, 4, 4), noise_level_at(COSINE, 41.5))


@pytest.mark.parametrize("weight", [1.0, 0.5, 0.0, -2.0])
def test_guidance_of_at_most_one_evaluates_the_cond_half_only_as_in_diffusers(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], weight: float
) -> None:
    network, x, level = fake_network("v", COSINE, labelled=True), noise(3, 1, 4, 4), noise_level_at(COSINE, 40)
    spec = spec_of("v", conditioning=CLASSES)
    found = labelled_denoiser(network, spec, np.array([1, 2, 3]), guidance=weight)(x, level)
    assert len(network.calls) == 1 and network.calls[0]["class_labels"].tolist() == [1, 2, 3]
    assert np.array_equal(found, labelled_denoiser(network, spec, np.array([1, 2, 3]))(x, level))
    assert evaluations_per_step(spec.with_plan(replace(spec.plan, guidance=weight))) == 1
    assert evaluations_per_step(spec.with_plan(replace(spec.plan, guidance=2.5))) == 2


@pytest.mark.parametrize("prediction", ["epsilon", "flow"])
def test_text_guidance_equals_two_separate_evaluations(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], prediction: str
) -> None:
    spec = spec_of(prediction, conditioning=TEXT)
    x, level, cond, uncond = (
        noise(2, 1, 4, 4),
        noise_level_at(COSINE, 40),
        text_inputs(1.0, 2.0),
        text_inputs(-3.0, -3.0),
    )
    network = fake_network(prediction, COSINE, cond=tuple(TEXT_INPUTS))

    def alone(these: dict[str, np.ndarray]) -> np.ndarray:
        return make_denoiser(network, spec, conditions=ConditioningInputs(these), clip=False)(x, level)

    expected = alone(uncond) + 2.5 * (alone(cond) - alone(uncond))
    guided_network = fake_network(prediction, COSINE, cond=tuple(TEXT_INPUTS))
    both = ConditioningInputs(cond, uncond)
    guided = make_denoiser(guided_network, spec, conditions=both, guidance=2.5, clip=False)(x, level)
    assert np.abs(guided - expected).max() < 1e-5
    (call,) = guided_network.calls
    assert all(np.array_equal(call[name], np.concatenate([cond[name], uncond[name]])) for name in TEXT_INPUTS)


def test_a_guidance_input_takes_one_evaluation_and_gets_the_weight(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray]
) -> None:
    spec = spec_of("v", conditioning=replace(TEXT, guidance_input=True))
    network = fake_network("v", COSINE, cond=(*TEXT_INPUTS, "guidance"))
    cond = ConditioningInputs(text_inputs(1.0, 2.0))
    make_denoiser(network, spec, conditions=cond, guidance=3.5)(noise(2, 1, 4, 4), noise_level_at(COSINE, 40))
    (call,) = network.calls
    assert call["guidance"].tolist() == [3.5, 3.5] and call["guidance"].dtype == np.float32
    assert len(call["sample"]) == 2
    assert evaluations_per_step(spec.with_plan(replace(spec.plan, guidance=3.5))) == 1


def test_part_selects_the_conditioning_of_those_samples() -> None:
    cond = ConditioningInputs(text_inputs(1.0, 2.0, 3.0), text_inputs(4.0, 5.0, 6.0)).part(slice(1, 3))
    assert cond.uncond is not None
    assert all(np.array_equal(cond.cond[name], text_inputs(2.0, 3.0)[name]) for name in TEXT_INPUTS)
    assert all(np.array_equal(cond.uncond[name], text_inputs(5.0, 6.0)[name]) for name in TEXT_INPUTS)
    assert ConditioningInputs(text_inputs(1.0)).part(slice(1)).uncond is None


def test_dummy_conditioning_is_classes_in_turn_or_noise_and_deterministic() -> None:
    labels = dummy_conditioning(spec_of("v", conditioning=CLASSES), 12)
    assert labels.cond["class_labels"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert labels.uncond is not None and set(labels.uncond["class_labels"].tolist()) == {10}
    spec = spec_of("v", conditioning=TEXT)
    first, again = dummy_conditioning(spec, 3), dummy_conditioning(spec, 3)
    assert {name: array.shape[1:] for name, array in first.cond.items()} == {n: f.shape for n, f in TEXT_INPUTS.items()}
    assert all(np.array_equal(first.cond[name], again.cond[name]) for name in TEXT_INPUTS)
    assert np.std(first.cond["encoder_hidden_states"]) > 0.5
    # sizes and masks hold no features
    assert (first.cond["encoder_attention_mask"] == 1).all() and (first.cond["time_ids"] == 1).all()
    assert first.uncond is not None and (first.uncond["encoder_attention_mask"] == 1).all()
    assert (first.uncond["encoder_hidden_states"] == 0).all()
    assert dummy_conditioning(spec_of("v"), 3).cond == {}


@pytest.mark.parametrize(("kind", "expected"), [(np.int64, 50), (np.float32, 50.4)])
def test_the_timestep_is_passed_in_the_type_of_the_graph(
    fake_network: type[FakeNetwork], noise: Callable[..., np.ndarray], kind: type[np.generic], expected: float
) -> None:
    network = fake_network("v", COSINE, timestep_type=np.dtype(kind))
    make_denoiser(network, spec_of("v"))(noise(2, 1, 4, 4), noise_level_at(COSINE, 50.4))
    timestep = network.calls[0]["timestep"]
    assert timestep.dtype == kind and timestep.shape == (2,) and timestep[0] == pytest.approx(expected)


def test_dummy_inputs_are_those_of_the_first_evaluation(fake_network: type[FakeNetwork]) -> None:
    spec = spec_of("v", conditioning=CLASSES)
    network = fake_network("v", COSINE, labelled=True)
    plain = dummy_inputs(network, spec, 3)
    guided = dummy_inputs(network, spec.with_plan(replace(spec.plan, guidance=2.0)), 3)
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
        (Conditioning(), False, {"guidance": 2.0}, "not conditional; use guidance 1"),
        (TEXT, False, {}, "its spec requires encoder_attention_mask, encoder_hidden_states, sample, time"),
        (TEXT, False, {"labels": np.array([1])}, "not class-conditional"),
        (Conditioning(), True, {}, "inputs are class_labels, sample, timestep; its spec requires"),
        (CLASSES, False, {"labels": np.array([1])}, "its spec requires class_labels"),
    ],
)
def test_arguments_that_do_not_fit_the_model_are_refused(
    fake_network: type[FakeNetwork], conditioning: Conditioning, labelled: bool, options: dict[str, Any], message: str
) -> None:
    network = fake_network("v", COSINE, labelled=labelled)
    with pytest.raises(InvalidInputError, match=message):
        labelled_denoiser(network, spec_of("v", conditioning=conditioning), **{"labels": None, **options})


@pytest.mark.parametrize(
    ("conditions", "guidance", "message"),
    [
        (None, 1.0, "expects encoder_attention_mask, encoder_hidden_states, time_ids, got none"),
        (ConditioningInputs({"time_ids": text_inputs(1.0)["time_ids"]}), 1.0, ", got time_ids"),
        (
            ConditioningInputs(text_inputs(1.0) | {"class_labels": np.array([1])}),
            1.0,
            ", got class_labels, encoder_attention_mask",
        ),
        (ConditioningInputs(text_inputs(1.0)), 2.0, "guidance needs an encoded negative prompt"),
    ],
)
def test_text_inputs_that_do_not_fit_the_model_are_refused(
    fake_network: type[FakeNetwork], conditions: ConditioningInputs | None, guidance: float, message: str
) -> None:
    network = fake_network("v", COSINE, cond=tuple(TEXT_INPUTS))
    with pytest.raises(InvalidInputError, match=message):
        make_denoiser(network, spec_of("v", conditioning=TEXT), conditions=conditions, guidance=guidance)


def test_conditioning_for_an_unconditional_model_is_refused(fake_network: type[FakeNetwork]) -> None:
    with pytest.raises(InvalidInputError, match="expects none, got class_labels"):
        make_denoiser(
            fake_network("v", COSINE), spec_of("v"), conditions=ConditioningInputs({"class_labels": np.array([1])})
        )


@pytest.mark.parametrize("shape", [(2,), (2, 5), (2, 4, 3), (2, 3, 4, 3)])
def test_a_correction_is_per_channel_for_samples_of_any_shape(shape: tuple[int, ...]) -> None:
    out = np.ones((3, *shape), np.float32)
    found = corrected(out, OutputCorrection(1.0, (1.0, -3.0)))
    assert found.shape == out.shape and (found[:, 0] == 0.0).all() and (found[:, 1] == 2.0).all()
