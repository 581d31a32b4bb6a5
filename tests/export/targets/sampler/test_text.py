"""Samplers of pipelines: prompts are token ids, and the text encoders and the decoder are inside."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

import diffpress as dp
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.targets.sampler.target import sampler_content
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.prompts import open_tokenizer, tokenize
from diffpress.runtime.sampler import noise_for
from diffpress.runtime.sampling_plan import make_plan
from tests.export.oracle import exported

SEEDS, PROMPTS, NEGATIVES = (3, 4), ("a photo of a cat", "red dog"), ("dog", "a cat")
MAX_ABS = 1e-3
CONFIG = ExportConfig(targets=("sampler",), threads=1)


@pytest.fixture(scope="module")
def sd(sd_bundle: Path) -> Bundle:
    """A bundle of a tiny Stable Diffusion with a short plan."""
    bundle = load_bundle(sd_bundle)
    return replace(bundle, spec=short(bundle.spec))


def short(spec: Any) -> Any:
    return spec.with_plan(make_plan("dpmpp_2m", 4, spec.schedule, guidance=3.0, clip=False))


@pytest.fixture
def folder(sd: Bundle, tmp_path: Path) -> Path:
    """An own folder of the same files."""
    return Path(shutil.copytree(sd.path, tmp_path / "sd"))


def expected_images(bundle: Bundle, negatives: tuple[str, ...] | None) -> np.ndarray:
    with dp.Pipeline(bundle, "onnxruntime", 1) as pipe:
        conditions = pipe.conditions(2, bundle.spec, prompts=PROMPTS, negatives=negatives)
        samples = np.concatenate(list(pipe.images(SEEDS, conditions, bundle.spec)))
    return (samples.transpose(0, 2, 3, 1) + 1) / 2


def fed(bundle: Bundle, negatives: tuple[str, ...] | None) -> dict[str, np.ndarray]:
    """Return the inputs that sampler.json asks for."""
    inputs = json.loads((bundle.path / "sampler.json").read_text())["inputs"]
    feed: dict[str, Any] = {"noise": noise_for(SEEDS, bundle.spec.sample_shape)}
    for number, encoder in enumerate(bundle.spec.conditioning.encoders, 1):
        for uncond, texts in (("", PROMPTS), ("uncond_", negatives)):
            for kind in ("input_ids", "attention_mask"):
                name = f"{uncond}{kind}" if number == 1 else f"{uncond}{kind}_{number}"
                if name not in inputs:
                    continue
                tokenizer = open_tokenizer(bundle.path / inputs[name]["tokenizer"] / "tokenizer.json")
                if texts is None:
                    feed[name] = [inputs[name]["default"]] * 2
                else:
                    tokens = tokenize(tokenizer, texts, encoder)
                    feed[name] = tokens.ids if kind == "input_ids" else tokens.mask
    if "guidance" in inputs:
        feed["guidance"] = inputs["guidance"]["default"]
    assert set(feed) == set(inputs)
    return {name: np.asarray(value, inputs[name]["dtype"]) for name, value in feed.items()}


def check(bundle: Bundle, negatives: tuple[str, ...] | None) -> np.ndarray:
    session = onnxruntime.InferenceSession(bundle.path / "sampler.onnx", providers=["CPUExecutionProvider"])
    images, expected = session.run(["images"], fed(bundle, negatives))[0], expected_images(bundle, negatives)
    np.testing.assert_allclose(images, expected, rtol=0, atol=MAX_ABS)
    assert expected.std() > 0.01
    return expected


def test_images_of_token_ids_are_those_of_the_runtimes_prompts(sd: Bundle, folder: Path) -> None:
    bundle = replace(sd, path=folder)
    assert "parity_failures" not in sampler_content(bundle, CONFIG)
    plain, negative = (check(bundle, negatives) for negatives in (None, NEGATIVES))
    assert np.abs(plain - negative).max() > 0.01


def test_no_negative_prompt_of_a_model_with_zeros_in_its_place_is_an_id_of_its_own(sd: Bundle, folder: Path) -> None:
    """SDXL: without a negative prompt the other half reads zeros, not an encoded empty prompt."""
    conditioning = replace(sd.spec.conditioning, zero_negative=True)
    bundle = replace(sd, path=folder, spec=replace(sd.spec, conditioning=conditioning))
    assert "parity_failures" not in sampler_content(bundle, CONFIG)
    default = json.loads((folder / "sampler.json").read_text())["inputs"]["uncond_input_ids"]["default"]
    assert set(default) == {-1}
    zeros, negative = (check(bundle, negatives) for negatives in (None, NEGATIVES))
    assert np.abs(zeros - negative).max() > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["dit", "ldm", "sdxl", "pixart-alpha", "pixart-alpha-1024", "sd3", "flux"])
def test_every_family_has_a_sampler(kind: str, tiny_folder: Callable[..., Path], tmp_path: Path) -> None:
    bundle = exported(load_checkpoint(tiny_folder(kind)), tmp_path / "b", ["sampler"], threads=1)
    assert bundle.manifest["sampler"]["parity"]["max_abs"] <= MAX_ABS
    if bundle.spec.conditioning.kind == "text":
        check(bundle, NEGATIVES if bundle.spec.plan.guidance > 1 and kind != "flux" else None)
