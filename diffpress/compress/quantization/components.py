"""Quantization of a pipeline's other components: text encoders and the decoder, weights and activations.

Each component is calibrated on its inputs in deployment. Formats and scales are chosen as for a denoiser:

    text encoders    the prompts of the run, and the empty prompt of guidance; with SmoothQuant, since a few channels of
                     the first token are far larger than all others
    vae_decoder      the samples at the end of the denoiser's trajectories; its first and last layer stay in float

The error is the PSNR of the final image with and without quantization: of the decoder on these samples, of a text
encoder by sampling a few images with what it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import mean_sqnr_db, psnr_db
from diffpress.compress.models.components import (
    DECODER,
    Component,
    component_names,
    load_component,
    prompt_conditions,
    text_inputs,
)
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.smoothquant import smoothing_vectors
from diffpress.compress.quantization.calibration.calibrate import calibrate, check_calibration
from diffpress.compress.quantization.calibration.observer import NonFiniteError, Observer, observe_layers
from diffpress.compress.quantization.config import QuantizeConfig, SmoothQuantConfig
from diffpress.compress.quantization.layer_graph import layer_graph
from diffpress.compress.quantization.layer_selection import FLOAT, choose_formats, quantized_outputs
from diffpress.compress.quantization.quantizers import fake_quantized_module, quantizers_that_ran
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset, on_best_device
from diffpress.compress.quantization.unified_scales import unify_scales
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.pipeline import decoded
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec, is_picture

logger = logging.getLogger(__name__)

COMPARED_IMAGES = 4  # sampled to measure the effect of a text encoder
CALIBRATION_LATENTS = 16
CALIBRATION_PROMPTS = 256


Use = Callable[[Component], object]  # runs a component on its calibration data
Draw = Callable[[Component], np.ndarray]  # final images [N, ...] with a component


@dataclass(frozen=True)
class ComponentData:
    """A component's module and how it is evaluated on its calibration data (calibration/calibrate.py)."""

    model: nn.Module
    evaluate: Callable[[], object]
    evaluations_per_batch: int = 1

    def observe(self, what: str, observers: Mapping[str, Observer], gathered: Mapping[str, torch.Tensor]) -> None:
        """Evaluate the module with `observers`, '<layer>.<input|output>' -> observer."""
        with observe_layers(self.model, observers, lambda x: (0, len(x))):
            self.evaluate()


def component_formats(checkpoint: Checkpoint, config: QuantizeConfig) -> dict[str, str]:
    """Return component -> format of those that the config quantizes.

    Raises:
        InvalidInputError: It names a component that the checkpoint does not have.
    """
    names = component_names(checkpoint)
    if config.components and not names:
        raise InvalidInputError("quantize: components: the model has no other components; remove the setting")
    if isinstance(config.components, str):
        return dict.fromkeys(names, config.components)
    for name in config.components:
        if name not in names:
            raise unknown_name("quantize: components: component", name, names)
    return {name: kind for name, kind in config.components.items() if kind != FLOAT}


def quantize_components(
    checkpoint: Checkpoint, config: QuantizeConfig, dataset: TrajectoryDataset, ctx: Context
) -> dict[str, Quantization]:
    """Return the formats and scales of the components that the config names; records the image PSNR of each in notes.

    Args:
        checkpoint: The checkpoint; its denoiser is not quantized.
        config: Settings of the stage.
        dataset: Trajectories of the denoiser.
        ctx: Context of the stage.

    Raises:
        InvalidInputError: A component cannot be quantized, or a value is not finite.
    """
    found, notes = {}, {}
    for name, kind in component_formats(checkpoint, config).items():
        component = load_component(checkpoint, name)
        if name == DECODER:
            use, images = _decoder_use(checkpoint, dataset)
        else:
            use, images = _text_encoder_use(checkpoint, component, ctx.prompts)
        found[name] = scales = _scales(component, kind, use, config)
        effect = _effect(images(component), images(fake_quantized_component(component, scales)), checkpoint.spec)
        notes[name] = {"format": kind, "layers": len(scales.layers), **effect}
        ((measure, decibels),) = effect.items()
        logger.info(f"{name}: {len(scales.layers)} layers in {kind}, {measure} {decibels:.1f}")
    if notes:
        ctx.notes["components"] = notes
    return found


def _effect(exact: np.ndarray, quantized: np.ndarray, spec: DenoiserSpec) -> dict[str, float]:
    """Return the PSNR of pictures in dB, or the SQNR of other data."""
    if not is_picture(exact.shape[1:]):
        return {"sample_sqnr_db": round(mean_sqnr_db(exact, quantized), 1)}
    low, high = spec.data_range
    return {"image_psnr_db": round(psnr_db(exact, quantized, high - low), 1)}


def _decoder_use(checkpoint: Checkpoint, dataset: TrajectoryDataset) -> tuple[Use, Draw]:
    latents = dataset.final_samples()[:CALIBRATION_LATENTS]

    def draw(decoder: Component) -> np.ndarray:
        return decode(decoder, latents, checkpoint.spec)

    return draw, draw


def _text_encoder_use(checkpoint: Checkpoint, component: Component, prompts: Sequence[str]) -> tuple[Use, Draw]:
    spec, inputs = checkpoint.spec, text_inputs(checkpoint, component, ["", *prompts[:CALIBRATION_PROMPTS]])
    texts = [prompts[i % len(prompts)] for i in range(COMPARED_IMAGES)]
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + COMPARED_IMAGES)
    decoder = load_component(checkpoint, DECODER) if DECODER in component_names(checkpoint) else None

    def draw(encoder: Component) -> np.ndarray:
        conditions = prompt_conditions(checkpoint, texts, {encoder.name: encoder})
        with on_best_device(checkpoint.model, COMPARED_IMAGES) as model:
            network = TorchNetwork(model, spec)
            samples = generate(network, spec, seeds, batch=COMPARED_IMAGES, conditions=conditions)
        return samples if decoder is None else decode(decoder, samples, spec)

    return lambda encoder: [encoder.run_all(feed) for feed in inputs], draw


def fake_quantized_component(component: Component, scales: Quantization) -> Component:
    """Return the component with quantizers inserted, which computes what a quantized graph does."""
    return replace(component, module=fake_quantized_module(component.module, scales))


def quantized_components(checkpoint: Checkpoint) -> dict[str, Component]:
    """Return the checkpoint's quantized components by name, with quantizers inserted."""
    return {
        name: fake_quantized_component(load_component(checkpoint, name), scales)
        for name, scales in checkpoint.component_quantization.items()
    }


def decode(decoder: Component, latents: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    """Decode latents [N, ...] to images [N, C, H, W]."""
    return decoded(lambda x: decoder.run_all({"latent_sample": x})["sample"], latents, spec)


def _scales(component: Component, kind: str, use: Use, config: QuantizeConfig) -> Quantization:
    """Choose the component's formats, and calibrate them while `use` runs it."""

    def evaluate() -> object:
        return component.run_all(component.example_arrays)

    graph = layer_graph(component.module, evaluate)
    off = QuantizeConfig()
    settings = config.model_copy(
        update={
            **{name: getattr(off, name) for name in ("split_concats", "svdquant")},
            "smoothquant": None if component.name == DECODER else config.smoothquant or SmoothQuantConfig(),
            **{"format": kind, "keep_sensitive_layers": False, "ignored_layers": (), "format_overrides": {}},
        }
    )
    order = list(graph.ranks)
    inner = order[1:-1] if component.name == DECODER else order
    refusal = f"quantize: components: {component.name} has no layer that can be in {kind}; leave it out"
    try:
        chosen = choose_formats(component.module, settings)
    except InvalidInputError as error:
        raise InvalidInputError(refusal) from error
    formats = {name: form for name, form in chosen.items() if name in inner}
    if not formats:
        raise InvalidInputError(refusal)
    check_calibration(formats, settings)
    outputs = [name for name in quantized_outputs(component.module, graph, formats, settings) if name in inner]
    try:
        data = ComponentData(component.module, lambda: use(component))
        smooth = smoothing_vectors(data, graph, formats, settings)
        amax = calibrate(data, formats, outputs, smooth, settings)
    except NonFiniteError as error:
        raise InvalidInputError(
            f"quantize: components: a value inside {component.name} is not finite in calibration; leave it out"
        ) from error
    # a smoothed layer quantizes a scaled copy of what it reads, so its input scale is its own
    amax |= unify_scales(graph, {key: a for key, a in amax.items() if key.removesuffix(".input") not in smooth})
    others = {name: form for name, form in formats.items() if form != kind}
    scales = Quantization(kind, amax, others, smooth).without(
        [name for name in formats if f"{name}.weight" not in amax]
    )
    quantized = fake_quantized_component(component, scales)
    bypassed = set(scales.amax) - quantizers_that_ran(
        quantized.module, lambda: quantized.run_all(component.example_arrays)
    )
    if bypassed:
        raise InvalidInputError(
            f"quantize: components: fake quantization of {', '.join(sorted(bypassed))} does not run in torch, so the "
            f"error of {component.name} is not measured; leave it out"
        )
    return scales
