"""export/targets/sampler: one graph gives the images of the sampler's loop, for every plan that it accepts."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from diffpress.export.targets.sampler.build import build_sampler
from diffpress.export.targets.sampler.supported import checked_program
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.conditioning import Conditioning, TensorInput
from diffpress.runtime.engines import load_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import step_by_step
from diffpress.runtime.network_inputs import tensor_conditioning
from diffpress.runtime.sampler import generate, noise_for
from diffpress.runtime.sampling_plan import OutputCorrection, Threshold
from diffpress.runtime.spec import DenoiserSpec
from tests.export.targets.sampler.unsealed import (
    SHAPE,
    nonlinear_graph,
    stored_arrays,
    stored_bytes,
    unsealed_bundle,
    written_sampler,
)
from tests.runtime.fused_specs import CLASSES, ONE_EVALUATION, OTHERS, spec_of

SEEDS = range(3)
EXACT = 2e-6  # of images in 0..1


def class_spec(solver: str, prediction: str = "v", **plan: Any) -> DenoiserSpec:
    return replace(spec_of(solver, prediction, conditioning=CLASSES, **plan), sample_shape=SHAPE)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return unsealed_bundle(tmp_path_factory.mktemp("bundle"), nonlinear_graph(), class_spec("ddim"))


def loop_images(bundle: Bundle, spec: DenoiserSpec) -> np.ndarray:
    """Return the images of the Python loop in 0..1, channels last."""
    with closing(load_engine(bundle.denoiser, "onnxruntime", threads=1)) as engine:
        samples = generate(step_by_step(engine), spec, SEEDS)
    low, high = spec.data_range
    return np.clip((samples - low) / (high - low), 0, 1).transpose(0, 2, 3, 1)


def sampler_images(bundle: Bundle, spec: DenoiserSpec, **inputs: Any) -> np.ndarray:
    file = written_sampler(replace(bundle, spec=spec))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    feed = {"noise": noise_for(SEEDS, SHAPE), "labels": np.arange(len(SEEDS)) % 4, **inputs}
    return session.run(["images"], feed)[0]


def weight(value: float) -> np.ndarray:
    return np.asarray(value, np.float32)


@pytest.mark.parametrize("solver", ONE_EVALUATION)
def test_every_solver_with_one_evaluation_per_step_gives_the_images_of_the_loop(bundle: Bundle, solver: str) -> None:
    spec = class_spec(solver, guidance=2.0)
    images, expected = sampler_images(bundle, spec, guidance=weight(2.0)), loop_images(bundle, spec)
    assert images.shape == (3, 3, 4, 3) and expected.std() > 0.05
    np.testing.assert_allclose(images, expected, rtol=0, atol=EXACT)


@pytest.mark.parametrize("prediction", ["epsilon", "v", "sample", "flow"])
@pytest.mark.parametrize("clip", [True, False])
def test_every_prediction_gives_the_images_of_the_loop(bundle: Bundle, prediction: str, clip: bool) -> None:
    spec = class_spec("dpmpp_2m", prediction, clip=clip, steps=6)
    np.testing.assert_allclose(sampler_images(bundle, spec), loop_images(bundle, spec), rtol=0, atol=EXACT)


@pytest.mark.parametrize(("given", "same_as"), [(3.5, 3.5), (1.0, 1.0), (0.0, 1.0)])
def test_the_guidance_weight_is_an_input_and_one_or_less_disables_it(
    bundle: Bundle, given: float, same_as: float
) -> None:
    spec = class_spec("ddim", guidance=2.0)
    expected = loop_images(bundle, spec.with_plan(replace(spec.plan, guidance=same_as)))
    images = sampler_images(bundle, spec, guidance=weight(given))
    np.testing.assert_allclose(images, expected, rtol=0, atol=EXACT)
    assert np.abs(images - loop_images(bundle, spec)).max() > 1e-3


def test_a_plan_without_guidance_has_no_input_for_it(bundle: Bundle) -> None:
    graph = build_sampler(replace(bundle, spec=class_spec("ddim"))).proto.graph
    assert [value.name for value in graph.input] == ["noise", "labels"]


def test_output_corrections_are_followed(bundle: Bundle) -> None:
    corrections = tuple(OutputCorrection(0.01 * i - 0.03, (0.02 * i, -0.1, 0.03)) for i in range(9))
    spec = class_spec("unipc_2")
    spec = spec.with_plan(replace(spec.plan, output_corrections=corrections))
    images = sampler_images(bundle, spec)
    np.testing.assert_allclose(images, loop_images(bundle, spec), rtol=0, atol=EXACT)
    plain = loop_images(bundle, spec.with_plan(spec.plan.without_corrections))
    assert np.abs(images - plain).max() > 1e-2


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_forecasts_of_a_step_cache_are_followed(bundle: Bundle, order: int, guidance: float) -> None:
    steps = ("full", "full", "forecast", "full", "forecast", "forecast", "full", "full", "forecast")
    spec = class_spec("dpmpp_2m", guidance=guidance, cache=StepCache("forecast", steps, order))
    given = {"guidance": weight(guidance)} if guidance > 1 else {}
    images = sampler_images(bundle, spec, **given)
    np.testing.assert_allclose(images, loop_images(bundle, spec), rtol=0, atol=EXACT)
    assert np.abs(images - loop_images(bundle, spec.with_plan(spec.plan.without_cache))).max() > 1e-4


def test_tensors_are_inputs_by_name_with_their_null_in_the_other_half(tmp_path: Path) -> None:
    tensors = Conditioning("tensors", tensors={"level": TensorInput((), "int64", null=3)})
    spec = replace(class_spec("dpmpp_2m", guidance=2.0), conditioning=tensors)
    bundle = unsealed_bundle(tmp_path / "tensors", nonlinear_graph(condition="level"), spec)
    level = np.array([1, 0, 2])
    with closing(load_engine(bundle.denoiser, "onnxruntime", threads=1)) as engine:
        conditions = tensor_conditioning(spec, 3, {"level": level})
        expected = generate(engine, spec, SEEDS, conditions=conditions)
    session = onnxruntime.InferenceSession(written_sampler(bundle), providers=["CPUExecutionProvider"])
    feed = {"noise": noise_for(SEEDS, SHAPE), "level": level, "guidance": weight(2.0)}
    images = session.run(["images"], feed)[0]
    np.testing.assert_allclose(images, (expected.transpose(0, 2, 3, 1) + 1) / 2, rtol=0, atol=EXACT)


def test_a_network_in_half_precision_gets_its_own_types(tmp_path: Path) -> None:
    spec = class_spec("ddim", guidance=2.0)
    bundle = unsealed_bundle(tmp_path / "half", nonlinear_graph(np.float16), spec, "fp16")
    images = sampler_images(bundle, spec, guidance=weight(2.0))
    np.testing.assert_allclose(images, loop_images(bundle, spec), rtol=0, atol=1e-3)


def test_the_file_does_not_grow_with_the_steps_except_for_their_coefficients(bundle: Bundle) -> None:
    sizes, weights = [], []
    for steps in (5, 50):
        file = written_sampler(replace(bundle, spec=class_spec("dpmpp_2m", steps=steps)))
        sizes.append(file.stat().st_size)
        weights.append(stored_bytes(file))
    assert sizes[1] - sizes[0] == pytest.approx(weights[1] - weights[0], abs=64)
    assert weights[1] - weights[0] < 45 * 64  # bytes of coefficients in 45 steps


def test_weights_are_in_the_subgraph_that_reads_them(bundle: Bundle) -> None:
    """ONNX Runtime does not convert the layout of other weights."""
    steps = ("full", "forecast") * 4 + ("full",)
    for cache, owner in ((None, "step"), (StepCache("forecast", steps), "evaluate")):
        spec = class_spec("ddim", guidance=2.0, cache=cache)
        arrays = stored_arrays(written_sampler(replace(bundle, spec=spec)))
        (found,) = (name for name, stored in arrays.items() if any(array.shape == (3, 3, 3, 3) for array in stored))
        assert found == owner


def test_large_weights_are_stored_once_in_a_data_file(bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.export.graph.model.MAX_INLINE_BYTES", 100)
    monkeypatch.setattr("diffpress.export.graph.model.SMALL_BYTES", 64)
    spec = class_spec("ddim", guidance=2.0)
    outside = sampler_images(bundle, spec, guidance=weight(2.0))
    assert (bundle.path / "sampler.onnx.data").stat().st_size >= 3 * 3 * 3 * 3 * 4
    np.testing.assert_allclose(outside, loop_images(bundle, spec), rtol=0, atol=EXACT)


@pytest.mark.parametrize("solver", OTHERS)
def test_other_solvers_are_refused_by_name(bundle: Bundle, solver: str) -> None:
    spec = replace(bundle, spec=class_spec(solver, prediction="flow" if solver == "heun_flow" else "v"))
    with pytest.raises(InvalidInputError, match=rf"target sampler: solver {solver} .*choose another plan") as refused:
        build_sampler(spec)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("setting", "named"),
    [
        ({"eta": 0.5}, "eta 0.5"),
        ({"threshold": Threshold()}, "threshold"),
        ({"guidance": 2.0, "guidance_rescale": 0.7}, "guidance_rescale 0.7"),
        ({"guidance": 2.0, "guidance_interval": (0.1, 2.0)}, "guidance_interval"),
        ({"cache": StepCache("features", ("full", "cached") * 4 + ("full",), cut="deep")}, "kind features"),
    ],
)
def test_settings_that_one_graph_cannot_express_are_refused_by_name(
    bundle: Bundle, setting: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"target sampler: .*{named}.* cannot be part of one graph"):
        build_sampler(replace(bundle, spec=class_spec("ddim", **setting)))


@pytest.mark.parametrize("solver", ["lcm", "consistency", "euler_ancestral"])
def test_a_solver_that_adds_noise_between_steps_is_accepted_for_one_step(bundle: Bundle, solver: str) -> None:
    spec = class_spec(solver, steps=1)
    np.testing.assert_allclose(sampler_images(bundle, spec), loop_images(bundle, spec), rtol=0, atol=EXACT)


def test_a_network_for_inpainting_is_refused(bundle: Bundle) -> None:
    spec = replace(class_spec("ddim"), conditioning=Conditioning("text", inpainting="mask"))
    with pytest.raises(InvalidInputError, match="target sampler: a network for inpainting reads an image"):
        checked_program(spec)


def test_samples_that_are_no_pictures_are_refused(bundle: Bundle) -> None:
    points = replace(class_spec("ddim"), sample_shape=(2,), conditioning=Conditioning())
    with pytest.raises(InvalidInputError, match="target sampler: samples of shape 2 are not pictures"):
        build_sampler(replace(bundle, spec=points))


def test_guidance_without_a_null_label_is_refused(bundle: Bundle) -> None:
    spec = replace(class_spec("ddim", guidance=2.0), conditioning=Conditioning("class", 4))
    with pytest.raises(InvalidInputError, match="guidance needs a null label"):
        build_sampler(replace(bundle, spec=spec))
