"""Quantization of a pipeline's other components: text encoders and the decoder, weights and activations.

Each is calibrated on what it computes in deployment, and its layers and scales are chosen as those of a denoiser:

    text encoders    the prompts of the run
    vae_decoder      the samples at the end of the denoiser's trajectories; its first and last layer stay in float

The error is measured where it is seen, in the final image: the decoder's on these samples, a text encoder's by sampling
a few of them again with the conditioning that it computes.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import psnr_db
from diffpress.compress.models.components import (
    DECODER,
    Component,
    component_names,
    encode_prompts,
    load_component,
    prompt_conditions,
)
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.calibration.calibrate import calibrate
from diffpress.compress.quantization.calibration.observer import NonFiniteError, Observer
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import LayerGraph, layer_graph
from diffpress.compress.quantization.layer_kinds import layer_input
from diffpress.compress.quantization.layer_selection import FLOAT, choose_formats, quantized_outputs
from diffpress.compress.quantization.quantizers import fake_quantized_module
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.quantization.unified_scales import unify_scales
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.pipeline import decoded
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

COMPARED = 4  # images that are sampled again to measure the effect of a text encoder
LATENTS = 16  # that the decoder is calibrated on

# evaluates a component, or its quantized copy, on its calibration data
Run = Callable[[Component], np.ndarray]


@dataclass(frozen=True)
class ComponentData:
    """A component's module with what it is calibrated on; there is one evaluation per batch."""

    model: nn.Module
    evaluate: Callable[[], object]
    evaluations_per_batch: int = 1

    def observe(self, what: str, observers: Mapping[str, Observer], gathered: Mapping[str, torch.Tensor]) -> None:
        """Evaluate the module with `observers`, '<layer>.<input|output>' -> observer."""
        modules = dict(self.model.named_modules())
        with ExitStack() as stack:
            for key, observe in observers.items():
                layer, _, side = key.rpartition(".")
                hook = partial(_observe, observe, side)
                stack.callback(modules[layer].register_forward_hook(hook, with_kwargs=True).remove)
            self.evaluate()


def _observe(
    observe: Observer, side: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> None:
    seen = layer_input(args, kwargs) if side == "input" else out[0] if isinstance(out, tuple) else out
    observe(seen, 0, len(seen))


def component_formats(checkpoint: Checkpoint, config: QuantizeConfig) -> dict[str, str]:
    """Return component -> format of those that the config quantizes.

    Raises:
        InvalidInputError: It names a component that the checkpoint does not have.
    """
    names = component_names(checkpoint)
    if isinstance(config.components, str):
        return dict.fromkeys(names, config.components)
    for name in config.components:
        if name not in names:
            raise unknown_name("quantize: components: component", name, names)
    return {name: kind for name, kind in config.components.items() if kind != FLOAT}


def quantize_components(
    checkpoint: Checkpoint, config: QuantizeConfig, dataset: TrajectoryDataset, ctx: Context
) -> dict[str, Quantization]:
    """Return the formats and scales of the components that the config names; notes their effect on the image.

    Args:
        checkpoint: The checkpoint; its denoiser is not quantized.
        config: Settings of the stage.
        dataset: Trajectories of the denoiser.
        ctx: Context of the stage.

    Raises:
        InvalidInputError: A component cannot be quantized, or a value is not finite.
    """
    found: dict[str, Quantization] = {}
    prompts = ctx.prompts
    for name, kind in component_formats(checkpoint, config).items():
        component = load_component(checkpoint, name)
        run = _decodes(checkpoint, dataset) if name == DECODER else _encodes(checkpoint, name, prompts)
        found[name] = scales = _scales(component, kind, run, config)
        quantized = replace(component, module=fake_quantized_module(component.module, scales))
        if name == DECODER:
            images, others = run(component), run(quantized)
        else:
            images, others = _sampled_again(checkpoint, dataset, prompts, quantized)
        low, high = checkpoint.spec.data_range
        image_psnr_db = round(psnr_db(images, others, high - low), 1)
        ctx.notes[name] = {"format": kind, "layers": len(scales.layers), "image_psnr_db": image_psnr_db}
        logger.info(f"{name}: {len(scales.layers)} layers in {kind}, the image keeps {image_psnr_db:.1f} dB PSNR")
    return found


def fake_quantized_components(checkpoint: Checkpoint) -> dict[str, Component]:
    """Return the checkpoint's quantized components with quantizers inserted, as the engine computes them."""
    found = {}
    for name, scales in checkpoint.components.items():
        component = load_component(checkpoint, name)
        found[name] = replace(component, module=fake_quantized_module(component.module, scales))
    return found


def _scales(component: Component, kind: str, run: Run, config: QuantizeConfig) -> Quantization:
    """Choose the component's formats and calibrate them while it runs."""
    graph = layer_graph(component.module, lambda: component.run_all(component.example_arrays))
    ends = tuple(_first_and_last(graph)) if component.name == DECODER else ()
    settings = QuantizeConfig(
        format=kind,
        calibration=config.calibration,
        reduce_range=config.reduce_range,
        keep_sensitive_layers=False,
        ignored_layers=ends,
    )
    formats = choose_formats(component.module, settings)
    formats = {name: form for name, form in formats.items() if name in graph.ranks}
    outputs = quantized_outputs(component.module, graph, formats, settings)
    data = ComponentData(component.module, lambda: run(component))
    try:
        amax = calibrate(data, formats, outputs, {}, settings)
    except NonFiniteError as error:
        raise InvalidInputError(
            f"quantize: a value inside {component.name} is not finite in calibration; leave it out of components"
        ) from error
    amax |= unify_scales(graph, amax)
    others = {name: form for name, form in formats.items() if form != kind}
    return Quantization(kind, amax, others).without([name for name in formats if f"{name}.weight" not in amax])


def _first_and_last(graph: LayerGraph) -> list[str]:
    """Return the layers that run first and last."""
    order = list(graph.ranks)
    return [order[0], order[-1]]


def _decodes(checkpoint: Checkpoint, dataset: TrajectoryDataset) -> Run:
    latents = dataset.final_samples()[:LATENTS]
    return lambda component: _decoded(component, latents, checkpoint.spec)


def _decoded(decoder: Component, latents: np.ndarray, spec: DenoiserSpec) -> np.ndarray:
    return decoded(lambda x: decoder.run_all({"latent_sample": x})["sample"], latents, spec)


def _encodes(checkpoint: Checkpoint, name: str, prompts: Sequence[str]) -> Run:
    def run(component: Component) -> np.ndarray:
        (first, *_) = encode_prompts(checkpoint, prompts, {name: component}).values()
        return first

    return run


def _sampled_again(
    checkpoint: Checkpoint, dataset: TrajectoryDataset, prompts: Sequence[str], quantized: Component
) -> tuple[np.ndarray, np.ndarray]:
    """Return a few images of the trajectories, and of the same noise with what the quantized text encoder computes."""
    spec, latents = checkpoint.spec, dataset.final_samples()[:COMPARED]
    texts = [prompts[i % len(prompts)] for i in range(len(latents))]
    conditions = prompt_conditions(checkpoint, texts, {quantized.name: quantized})
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + len(latents))
    network = TorchNetwork(checkpoint.model, spec)
    others = generate(network, spec, seeds, batch=len(latents), conditions=conditions)
    if DECODER not in component_names(checkpoint):
        return latents, others
    decoder = load_component(checkpoint, DECODER)
    return _decoded(decoder, latents, spec), _decoded(decoder, others, spec)
