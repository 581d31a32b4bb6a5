"""compress/quantization/components.py: text encoders and decoders in int8, from calibration to the bundle."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import psnr_db
from diffpress.compress.evaluation.open_subject import open_subject
from diffpress.compress.models.components import (
    DECODER,
    Component,
    encode_prompts,
    load_component,
    prompt_conditions,
)
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.components import component_formats, quantized_components
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize, trajectories_of
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.training.teacher_data import TeacherData
from diffpress.export.bundle import export_bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

TEXT = "text_encoder"
CONFIG = QuantizeConfig(samples=4, batch=4, components="int8")
PROMPTS = ("a red cat", "a photo of a dog")


@pytest.fixture(scope="module")
def teacher(tiny_folder: Callable[..., Path]) -> Checkpoint:
    checkpoint = load_checkpoint(tiny_folder("sd"))
    plan = checkpoint.spec.plan
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan.over(plan.timesteps[::10])))


@pytest.fixture(scope="module")
def context(teacher: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Context:
    work = tmp_path_factory.mktemp("work")
    return Context(0, work, teacher, TeacherData(teacher, 4, work, PROMPTS))


@pytest.fixture(scope="module")
def quantized(teacher: Checkpoint, context: Context) -> Checkpoint:
    return quantize(teacher, CONFIG, context)


def test_the_linear_layers_of_a_text_encoder_and_the_inner_layers_of_a_decoder_are_quantized(
    quantized: Checkpoint,
) -> None:
    assert set(quantized.component_quantization) == {TEXT, DECODER}
    text, decoder = quantized.component_quantization[TEXT], quantized.component_quantization[DECODER]
    modules: dict[str, Any] = dict(load_component(quantized, TEXT).module.named_modules())
    assert text.layers == sorted(name for name, one in modules.items() if isinstance(one, torch.nn.Linear))
    assert all(f"{name}.input" in text.amax for name in text.layers)
    assert {"post_quant_conv", "decoder.conv_out"}.isdisjoint(decoder.layers) and "decoder.conv_in" in decoder.layers


def test_an_input_scale_covers_the_smoothed_activations_of_the_runs_prompts(
    quantized: Checkpoint, context: Context
) -> None:
    component = load_component(quantized, TEXT)
    assert set(quantized.component_quantization[TEXT].smooth) == set(quantized.component_quantization[TEXT].layers)
    assert not quantized.component_quantization[DECODER].smooth
    (name,) = [
        name for name in quantized.component_quantization[TEXT].layers if name.endswith("layers.0.self_attn.q_proj")
    ]
    seen: list[float] = []
    modules: dict[str, Any] = dict(component.module.named_modules())
    smooth = quantized.component_quantization[TEXT].smooth[name]
    modules[name].register_forward_pre_hook(lambda _, args: seen.append((args[0] / smooth).abs().max().item()))
    encode_prompts(quantized, ["", *context.prompts], {TEXT: component})
    assert 0.5 * max(seen) <= quantized.component_quantization[TEXT].amax[f"{name}.input"].item() <= max(seen)


def test_the_noted_effect_is_that_on_the_final_image(
    teacher: Checkpoint, quantized: Checkpoint, context: Context
) -> None:
    # the trajectories have the prompts of the run, so their samples are those of the float text encoder
    spec, rounded = teacher.spec, quantized_components(quantized)
    latents = trajectories_of(teacher, CONFIG, context).final_samples()
    conditions = prompt_conditions(teacher, PROMPTS * 2, {TEXT: rounded[TEXT]})
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + 4)
    again = generate(TorchNetwork(teacher.model, spec), spec, seeds, batch=4, conditions=conditions)
    decoder = load_component(teacher, DECODER)
    exact = images_of(decoder, latents, spec)
    for name, others in (
        (DECODER, images_of(rounded[DECODER], latents, spec)),
        (TEXT, images_of(decoder, again, spec)),
    ):
        noted = context.notes["components"][name]
        assert noted["format"] == "int8" and noted["layers"] == len(quantized.component_quantization[name].layers)
        assert noted["image_psnr_db"] == pytest.approx(psnr_db(exact, others, 2.0), abs=0.1)
        assert 15.0 < noted["image_psnr_db"] < 80.0


def images_of(decoder: Component, latents: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    scaled = latents / np.float32(spec.latent_scale) + np.float32(spec.latent_shift)
    return decoder.run_all({"latent_sample": scaled})["sample"].clip(-1, 1)


def test_scales_of_components_survive_saving(quantized: Checkpoint, tmp_path: Path) -> None:
    save_checkpoint(quantized, tmp_path / "saved")
    loaded = load_checkpoint(tmp_path / "saved")
    assert loaded.hash == quantized.hash != quantized.evolve(component_quantization={}).hash
    for name, scales in quantized.component_quantization.items():
        assert loaded.component_quantization[name].facts() == scales.facts()
        assert all(
            torch.equal(loaded.component_quantization[name].amax[key], value) for key, value in scales.amax.items()
        )


def test_a_bundle_holds_the_components_in_int8_and_computes_what_torchs_fake_quantization_does(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    float_components = quantized.evolve(component_quantization={})
    bundle, plain = (
        export_bundle(one, tmp_path / name, ExportConfig(targets=("onnx",), threads=1))
        for name, one in (("small", quantized), ("plain", float_components))
    )
    for name in (TEXT, DECODER):
        entry, other = bundle.manifest["graphs"][name], plain.manifest["graphs"][name]
        assert (entry["precision"], other["precision"]) == ("int8", "fp32")
        weights = [tensor.data_type for tensor in onnx.load(bundle.path / entry["file"]).graph.initializer]
        assert weights.count(onnx.TensorProto.INT8) >= len(quantized.component_quantization[name].layers)
        assert entry["bytes"] < other["bytes"]
    expected = quantized_components(quantized)
    with Pipeline(bundle) as pipe:
        cond = pipe.conditions(2, prompts=list(PROMPTS)).cond
        for name, array in encode_prompts(quantized, PROMPTS, {TEXT: expected[TEXT]}).items():
            assert psnr_db(array[None], cond[name][None], float(np.ptp(array))) > 35.0
        latents = np.random.default_rng(1).standard_normal((1, *quantized.spec.sample_shape)).astype(np.float32)
        exact = images_of(load_component(quantized, DECODER), latents, quantized.spec)
        rounded = images_of(expected[DECODER], latents, quantized.spec)
        # integers on the edge between two values differ, so the errors are compared
        assert psnr_db(exact, pipe.decode(latents), 2.0) == pytest.approx(psnr_db(exact, rounded, 2.0), abs=2.0)


def test_a_checkpoint_in_torch_is_evaluated_with_its_quantized_components(
    quantized: Checkpoint, tmp_path: Path
) -> None:
    save_checkpoint(quantized, tmp_path / "saved")
    latents = np.random.default_rng(1).standard_normal((1, *quantized.spec.sample_shape)).astype(np.float32)
    subject = open_subject(str(tmp_path / "saved"), texts=PROMPTS)
    (decoder, encoder) = (quantized_components(quantized)[name] for name in (DECODER, TEXT))
    np.testing.assert_allclose(subject.decode(latents), images_of(decoder, latents, quantized.spec), atol=1e-5)
    found = subject.conditions(2).cond
    for name, array in encode_prompts(quantized, PROMPTS, {TEXT: encoder}).items():
        np.testing.assert_allclose(found[name], array, atol=1e-5)


def test_components_are_named_and_chosen(teacher: Checkpoint) -> None:
    both = {TEXT: "int8", DECODER: "int8"}
    assert component_formats(teacher, QuantizeConfig(components="int8")) == both
    assert component_formats(teacher, QuantizeConfig(components={TEXT: "int8", DECODER: "float"})) == {TEXT: "int8"}
    with pytest.raises(InvalidInputError, match=r"text_encodre.*did you mean 'text_encoder'"):
        component_formats(teacher, QuantizeConfig(components={"text_encodre": "int8"}))
    alone = teacher.evolve(source=replace(teacher.source, pipeline_folder=None))
    for components in ("int8", {DECODER: "int8"}):
        with pytest.raises(InvalidInputError, match="the model has no other components"):
            component_formats(alone, QuantizeConfig(components=components))


@pytest.mark.parametrize("decoder", [nn.Sequential(nn.Upsample(scale_factor=2)), nn.Sequential(nn.Conv2d(1, 3, 1))])
def test_a_decoder_without_inner_layers_is_refused_by_name(
    decoder: nn.Module, unet: Checkpoint, tmp_path: Path
) -> None:
    custom = unet.evolve(source=replace(unet.source, decoder=decoder))
    with pytest.raises(InvalidInputError, match="vae_decoder has no layer that can be in int8; leave it out"):
        quantize(custom, QuantizeConfig(samples=4, batch=4, components="int8"), Context(0, tmp_path, custom))


def test_layers_whose_names_begin_like_those_of_the_first_and_last_are_quantized(
    unet: Checkpoint, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    channels = unet.spec.sample_shape[0]
    names = {"conv": nn.Conv2d(channels, 8, 3), "conv2": nn.Conv2d(8, 8, 3), "conv3": nn.Conv2d(8, 3, 3)}
    custom = unet.evolve(source=replace(unet.source, decoder=nn.Sequential(OrderedDict(names)).eval()))
    config = QuantizeConfig(samples=4, batch=4, components="int8")
    found = quantize(custom, config, Context(0, tmp_path, custom))
    assert found.component_quantization[DECODER].layers == ["conv2"]
