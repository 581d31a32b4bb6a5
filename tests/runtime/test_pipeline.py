"""runtime/pipeline.py with engines known in closed form: sizes, prompts, and decoding of latents to images."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import diffpress.runtime.text_encoders
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.conditioning import Conditioning, TextEncoder, TextInput
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.control import ControlRequest
from diffpress.runtime.image_size import has_fixed_size, resized
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import flow_schedule
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan
from diffpress.runtime.spaced_timesteps import space
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.text_encoders import SMALL_BYTES
from diffpress.runtime.timesteps import TimestepSpacing

FLOAT32, INT64 = np.dtype(np.float32), np.dtype(np.int64)
SCHEDULE = flow_schedule(1000)
TEXT = Conditioning(
    "text",
    encoders=(TextEncoder("text_encoder", "tokenizer", 3),),
    inputs={"states": TextInput((3, 2), (("text_encoder.hidden",),))},
)


def make_spec(conditioning: Conditioning | None = None, **changes: Any) -> DenoiserSpec:
    """Return a spec with latents of 4 x 8 x 8, 4 pixels per cell, and sizes in multiples of two cells."""
    plan = make_plan("euler", 2, SCHEDULE, guidance=3.0 if conditioning is TEXT else 1.0, clip=False)
    spec = DenoiserSpec("flow", SCHEDULE, (4, 8, 8), plan, conditioning or Conditioning(), latent_factor=4)
    return replace(spec, size_multiple=2, **changes)


def make_bundle(
    spec: DenoiserSpec, sides: tuple[Any, ...] = ("height", "width"), text_encoder_bytes: int = 10
) -> Bundle:
    """Return a bundle whose denoiser has 10 bytes."""
    ids = {"input_ids": {"dtype": "int64", "shape": ["batch", 3]}}
    sample = {"sample": {"dtype": "float32", "shape": ["batch", 4, *sides]}}
    graphs: dict[str, Any] = {
        "denoiser": {"file": "denoiser.onnx", "inputs": sample, "bytes": 10},
        "vae_decoder": {"file": "d.onnx"},
        "text_encoder": {"file": "t", "inputs": ids, "bytes": text_encoder_bytes},
    }
    return Bundle(Path("there"), spec, {"graphs": graphs})


@dataclass
class FakeEngines:
    """Replaces the engines and records which graphs were opened, which are still open, and their batch sizes."""

    opened: list[str] = field(default_factory=list)
    running: list[str] = field(default_factory=list)
    batches: list[tuple[str, int]] = field(default_factory=list)

    def open(
        self, bundle: Bundle, name: str | None, graph: str = "denoiser", options: Any = None, lora: bool = False
    ) -> Any:
        self.opened.append(graph)
        self.running.append(graph)
        conditions = dict.fromkeys(bundle.spec.conditioning.inputs, FLOAT32)
        inputs = {
            "denoiser": {"sample": FLOAT32, "timestep": FLOAT32, **conditions},
            "vae_decoder": {"latent_sample": FLOAT32},
            "text_encoder": {"input_ids": INT64},
        }

        def run(feed: dict[str, np.ndarray]) -> np.ndarray:
            first = next(iter(feed.values()))
            self.batches.append((graph, len(first)))
            # the decoder returns the first three channels, one pixel per cell
            return first[:, :3].copy() if graph == "vae_decoder" else np.zeros_like(first)

        def run_all(feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            return {"hidden": np.repeat(feed["input_ids"][..., None], 2, axis=-1).astype(np.float32)}

        close = lambda: self.running.remove(graph)  # noqa: E731
        return SimpleNamespace(name=name or "fake", inputs=inputs[graph], run=run, run_all=run_all, close=close)


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> FakeEngines:
    fake = FakeEngines()
    replace_engines(monkeypatch, fake.open)
    return fake


def replace_engines(monkeypatch: pytest.MonkeyPatch, opener: Callable[..., Any]) -> None:
    """Let a pipeline open its graphs with `opener`."""
    for module in ("pipeline", "lora.engines"):
        monkeypatch.setattr(f"diffpress.runtime.{module}.open_engine", opener)


class Letters:
    """A tokenizer whose ids are the letters' positions in the alphabet."""

    def __init__(self, *_: Any) -> None:
        pass

    def num_special_tokens_to_add(self, pair: bool) -> int:
        return 0

    def enable_truncation(self, length: int) -> None:
        self.length = length

    def no_padding(self) -> None:
        pass

    def get_added_tokens_decoder(self) -> dict[int, Any]:
        return {}

    def encode(self, text: str) -> Any:
        ids = [ord(letter) - 96 for letter in text]
        rest = SimpleNamespace(offsets=[(self.length, len(text))], special_tokens_mask=[0])
        return SimpleNamespace(ids=ids[: self.length], overflowing=[rest] if len(text) > self.length else [])


@pytest.fixture
def letters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diffpress.runtime.text_encoders, "open_tokenizer", Letters)


# --- sizes -----------------------------------------------------------------------------------------------------


def test_another_size_changes_only_the_sample_shape() -> None:
    spec = make_spec()
    other = resized(spec, (48, 24))
    assert other.sample_shape == (4, 12, 6) and other.image_size == (48, 24)
    assert replace(other, sample_shape=spec.sample_shape) == spec
    assert resized(spec, (32, 32)) is spec and resized(spec, (32, 32), fixed=True) is spec


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((30, 32), "32x32"), ((32, 45), "32x48"), ((3, 3), "8x8"), ((0, 8), "8x8"), ((50, 70), "48x72")],
)
def test_a_size_that_is_no_multiple_is_refused_with_the_nearest_one(size: tuple[int, int], nearest: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"{size[0]}x{size[1]}.*multiples of 8.*nearest is {nearest}"):
        resized(make_spec(), size)


def test_a_fixed_size_graph_refuses_other_sizes() -> None:
    with pytest.raises(InvalidInputError, match=r"size 48x24.*makes 32x32 images only"):
        resized(make_spec(), (48, 24), fixed=True)


def test_a_fixed_size_is_recognized_from_the_graph_inputs() -> None:
    assert has_fixed_size(make_bundle(make_spec(), (8, 8)))
    assert not has_fixed_size(make_bundle(make_spec()))
    silent = make_bundle(make_spec())
    del silent.manifest["graphs"]["denoiser"]["inputs"]
    assert has_fixed_size(silent)


def test_a_larger_image_is_shifted_further_towards_the_noise() -> None:
    # shift exp(m), m linear from 0.5 at 16 tokens to 1.25 at 64 tokens, as in Flux
    spacing = TimestepSpacing("linspace", integer=False, dynamic=(0.5, 1.25, 16, 64))
    spec = make_spec(spacing=spacing)
    steps = space(spacing, 4, SCHEDULE, spec.tokens(spec.sample_shape)).timesteps
    spec = spec.with_plan(SamplingPlan("euler", steps, clip=False))
    large = resized(spec, (64, 64))
    assert spec.tokens(spec.sample_shape) == 16 and large.tokens(large.sample_shape) == 64
    for before, after in zip(spec.plan.timesteps, large.plan.timesteps, strict=True):
        s, k = before / 999, math.exp(1.25) / math.exp(0.5)
        assert after / 999 == pytest.approx(k * s / (1 + (k - 1) * s), rel=1e-9)
    assert resized(large, (32, 32)).plan.timesteps == pytest.approx(spec.plan.timesteps, rel=1e-9)


# --- from latents to images ------------------------------------------------------------------------------------


def test_latents_are_scaled_and_shifted_before_they_are_decoded_one_by_one(engines: FakeEngines) -> None:
    spec = make_spec(latent_scale=0.25, latent_shift=-0.5)
    pipeline = Pipeline(make_bundle(spec))
    latents = np.linspace(-0.6, 0.6, 2 * 4 * 64, dtype=np.float32).reshape(2, 4, 8, 8)
    expected = np.clip(latents[:, :3] / 0.25 - 0.5, -1, 1)
    np.testing.assert_allclose(pipeline.decode(latents), expected, rtol=0, atol=1e-6)
    assert expected.min() == -1 and expected.max() == 1, "both bounds are reached"
    assert engines.batches == [("vae_decoder", 1)] * 2


def test_pixels_need_no_decoder(engines: FakeEngines) -> None:
    pixels = np.ones((2, 3, 8, 8), np.float32)
    spec = replace(make_spec(), latent_factor=1, sample_shape=(3, 8, 8))
    assert Pipeline(make_bundle(spec)).decode(pixels) is pixels and engines.opened == ["denoiser"]


def test_images_come_batch_by_batch_and_large_text_encoders_are_closed(engines: FakeEngines, letters: None) -> None:
    pipeline = Pipeline(make_bundle(make_spec(TEXT), text_encoder_bytes=SMALL_BYTES + 1))
    conditions = pipeline.conditions(3, prompts=["a", "b", "c"])
    assert engines.running == ["denoiser"] and set(engines.opened) == {"denoiser", "text_encoder"}
    found = [len(images) for images in pipeline.images([0, 1, 2], conditions, batch=2)]
    assert (
        found == [2, 1] and engines.running == ["denoiser", "vae_decoder"] and engines.opened.count("vae_decoder") == 1
    )
    # guidance doubles the batch, two steps each
    assert [size for graph, size in engines.batches if graph == "denoiser"] == [4, 4, 2, 2]
    pipeline.close()
    assert engines.running == []


@pytest.mark.parametrize("text_encoder_bytes", [1, SMALL_BYTES])
def test_a_small_text_encoder_or_one_no_larger_than_the_denoiser_is_opened_once(
    text_encoder_bytes: int, engines: FakeEngines, letters: None
) -> None:
    pipeline = Pipeline(make_bundle(make_spec(TEXT), text_encoder_bytes=text_encoder_bytes))
    first = pipeline.conditions(9, prompts=["a"] * 9)
    again = pipeline.conditions(9, prompts=["a"] * 9)
    np.testing.assert_array_equal(first.cond["states"], again.cond["states"])
    assert engines.running == ["denoiser", "text_encoder"] == engines.opened
    pipeline.close()
    assert engines.running == []


def test_an_image_does_not_depend_on_its_batch(engines: FakeEngines) -> None:
    pipeline = Pipeline(make_bundle(make_spec()))
    three = np.concatenate(list(pipeline.images([5, 6, 7], ConditioningInputs(), batch=3)))
    (one,) = pipeline.images([7], ConditioningInputs())
    np.testing.assert_array_equal(three[2:], one)


@pytest.mark.parametrize("streams", [2, 5])
def test_streams_change_neither_the_images_nor_their_order(tiny: Path, streams: int) -> None:
    bundle, seeds = load_bundle(tiny), range(7, 20)

    def images(count: int) -> np.ndarray:
        options = EngineOptions(threads=count, streams=count)
        with closing(Pipeline(bundle, "onnxruntime", options=options)) as pipeline:
            return np.concatenate(list(pipeline.images(seeds, pipeline.conditions(13), batch=3)))

    np.testing.assert_array_equal(images(streams), images(1))


# --- prompts ---------------------------------------------------------------------------------------------------


def test_prompts_and_negative_prompts_become_the_cond_and_uncond_halves(
    engines: FakeEngines, letters: None, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = Pipeline(make_bundle(make_spec(TEXT)))
    conditions = pipeline.conditions(2, prompts=["ab", "abcz"], negatives=["c", "c"])
    assert conditions.cond["states"][:, :, 0].tolist() == [[1, 2, 0], [1, 2, 3]]
    assert conditions.uncond is not None and conditions.uncond["states"][:, :, 0].tolist() == [[3, 0, 0]] * 2
    (warning,) = caplog.records
    assert warning.levelname == "WARNING" and "left out 'z'" in warning.getMessage()
    plain = pipeline.conditions(2, prompts=["ab", "b"])
    assert plain.uncond is not None and not plain.uncond["states"].any()


def test_without_guidance_only_the_prompts_are_encoded(engines: FakeEngines, letters: None) -> None:
    spec = make_spec(TEXT)
    spec = spec.with_plan(replace(spec.plan, guidance=1.0))
    assert Pipeline(make_bundle(spec)).conditions(1, prompts=["a"]).uncond is None


def assert_refused(engines: FakeEngines, spec: DenoiserSpec, arguments: dict[str, Any], *words: str) -> None:
    with pytest.raises(InvalidInputError) as caught:
        Pipeline(make_bundle(spec)).conditions(1, **arguments)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_a_text_conditional_model_needs_a_prompt(engines: FakeEngines) -> None:
    assert_refused(engines, make_spec(TEXT), {}, "give a prompt")


def test_a_negative_prompt_needs_guidance(engines: FakeEngines) -> None:
    spec, arguments = make_spec(TEXT), {"prompts": ["a"], "negatives": ["b"]}
    assert_refused(
        engines, spec.with_plan(replace(spec.plan, guidance=1.0)), arguments, "negative prompt", "guidance above 1"
    )
    # a weight that is an input of the network needs no uncond half
    assert_refused(
        engines, replace(spec, conditioning=replace(TEXT, guidance_input=True)), arguments, "negative prompt"
    )


def test_a_bundle_without_text_encoder_refuses_prompts(engines: FakeEngines) -> None:
    bare = make_spec(replace(TEXT, encoders=()))
    bare = bare.with_plan(replace(bare.plan, guidance=3.0))
    assert_refused(engines, bare, {"prompts": ["a"]}, "there", "no text encoder", "whole pipeline")


def test_without_labels_the_classes_are_taken_in_turn(engines: FakeEngines) -> None:
    pipeline = Pipeline(make_bundle(make_spec(Conditioning("class", classes=2))))
    assert pipeline.conditions(3).cond["class_labels"].tolist() == [0, 1, 0]
    assert pipeline.conditions(2, labels=[1, 1]).cond["class_labels"].tolist() == [1, 1]
    assert_refused(engines, make_spec(), {"labels": [1]}, "not class-conditional")


# --- threads ---------------------------------------------------------------------------------------------------


def test_threads_that_share_a_pipeline_open_each_component_once(
    engines: FakeEngines, letters: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slowly(*arguments: Any, **settings: Any) -> Any:
        time.sleep(0.05)  # so that the others arrive before the engine is open
        return engines.open(*arguments, **settings)

    replace_engines(monkeypatch, slowly)
    with closing(Pipeline(make_bundle(make_spec(TEXT)))) as pipe, ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda seed: pipe("abc", seeds=seed)[0].tobytes(), range(4)))
        assert found == [pipe("abc", seeds=seed)[0].tobytes() for seed in range(4)]
    assert sorted(engines.opened) == ["denoiser", "text_encoder", "vae_decoder"]
    assert engines.running == []


def test_threads_that_share_a_pipeline_open_its_control_networks_once(
    engines: FakeEngines, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    class Slow:
        def __init__(self, bundle: Bundle, engine: str, options: EngineOptions) -> None:
            time.sleep(0.05)  # so that the others arrive before it is open
            opened.append(engine)

        def control(self, request: Any, count: int) -> int:
            return count

        def close(self) -> None:
            pass

    monkeypatch.setattr("diffpress.runtime.pipeline.ControlEngines", Slow)
    with closing(Pipeline(make_bundle(make_spec()))) as pipe, ThreadPoolExecutor(4) as pool:
        found: list[Any] = list(pool.map(lambda count: pipe.control(ControlRequest(()), count), range(4)))
    assert found == [0, 1, 2, 3]
    assert opened == ["fake"]
