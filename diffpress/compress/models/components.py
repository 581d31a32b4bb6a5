"""Components of a pipeline besides the denoiser: text encoders and the latent decoder, to run or to export.

    text_encoder   input_ids int64 [B, L] (, attention_mask int64 [B, L])  ->
                       CLIP: [text_embeds,] last_hidden_state [, pooler_output], hidden_states.0 ... in this order
                       T5:   last_hidden_state
    vae_decoder    latent_sample f32 [B, C, h, w]                          ->  sample f32 [B, 3, H, W]
                   (a custom module's: [B, ...] -> [B, ...])

Names and order are those of optimum's ONNX pipelines, so that optimum can load a bundle. A component is loaded from the
checkpoint's folder when it is needed and dropped afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.compress.sources.autoencoder import Autoencoder, autoencoder_of
from diffpress.compress.sources.layout import TEXT_ENCODERS, Layout, read_layout
from diffpress.compress.sources.pretrained import (
    DECODER_MODELS,
    ENCODER,
    TEXT_MODELS,
    load_diffusers_model,
    load_text_encoder,
)
from diffpress.runtime.conditioning import TextEncoder
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.guidance import is_guided
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.prompts import BATCH, IDS, MASK, encode, tokenize, unconditional
from diffpress.runtime.spec import DenoiserSpec

DECODER = "vae_decoder"
EXAMPLE_PROMPTS = ("a photo of a lighthouse in the fog", "")
# pipelines that pass the attention mask to a text encoder whose config has `use_attention_mask`
MASKED_PIPELINES = (
    "",
    "StableDiffusionPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Component:
    """A component with everything needed to trace it; it can also be run like an engine.

    Attributes:
        name: Name of its graph.
        folder: Name of its folder in the diffusers pipeline.
        config: Its config.json.
        module: The torch module.
        forward: Function that runs `module` on inputs by name and returns the outputs.
        examples: Example inputs.
        outputs: Names of the outputs.
        axes: Dynamic axes of the inputs.
    """

    name: str
    folder: str
    config: dict[str, Any]
    module: nn.Module
    forward: Callable[[nn.Module, Tensors], tuple[torch.Tensor, ...]]
    examples: Tensors
    outputs: list[str]
    axes: dict[str, dict[int, str]]

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """Input names and dtypes."""
        return {name: tensor.numpy().dtype for name, tensor in self.examples.items()}

    @property
    def example_arrays(self) -> dict[str, np.ndarray]:
        """The example inputs as arrays."""
        return {name: tensor.numpy() for name, tensor in self.examples.items()}

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one batch and return all outputs by name, as an engine does."""
        feed = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}
        with torch.no_grad(), without_fast_path():
            found = self.forward(self.module, feed)
        return {name: tensor.float().numpy() for name, tensor in zip(self.outputs, found, strict=True)}

    def close(self) -> None:
        """Do nothing; part of the engine interface."""


def component_names(checkpoint: Checkpoint) -> list[str]:
    """Return the names of the component graphs of a bundle, text encoders first."""
    if checkpoint.source.pipeline_folder is None:
        return [] if checkpoint.source.decoder is None else [DECODER]
    encoders = [encoder.graph for encoder in checkpoint.spec.conditioning.encoders]
    return encoders if read_layout(checkpoint.source.pipeline_folder).decoder is None else [*encoders, DECODER]


def load_component(checkpoint: Checkpoint, name: str) -> Component:
    """Load one of `component_names`.

    Raises:
        InvalidInputError: Its class is not supported, or its weights cannot be read.
    """
    if checkpoint.source.decoder is not None:
        return _custom_decoder(checkpoint.source.decoder, checkpoint.spec)
    assert checkpoint.source.pipeline_folder is not None  # else component_names is empty
    if name in TEXT_ENCODERS:
        return _text_encoder(read_layout(checkpoint.source.pipeline_folder), name, checkpoint.spec)
    autoencoder = autoencoder_of(checkpoint)
    assert autoencoder is not None
    return _decoder(autoencoder, checkpoint.spec)


def _text_encoder(layout: Layout, name: str, spec: DenoiserSpec) -> Component:
    config, kind, folder = layout.configs[name], layout.kind_of(name), layout.folder / name
    _check_supported(folder, kind, TEXT_MODELS)
    module: Any = load_text_encoder(folder, kind)
    encoder = next(e for e in spec.conditioning.encoders if e.graph == name)
    _check_vocabulary(layout, encoder, module.get_input_embeddings().weight.shape[0])
    tokenizer = layout.tokenizer(encoder.tokenizer).backend_tokenizer
    examples = {IDS: torch.from_numpy(tokenize(tokenizer, EXAMPLE_PROMPTS, encoder).ids)}
    masked = config.get("use_attention_mask") and layout.pipeline in MASKED_PIPELINES
    if masked or any(f"{name}.{MASK}" in rows for rows in _encoder_outputs(spec)):
        # if the denoiser receives the mask, so does its text encoder
        examples[MASK] = torch.ones(2, encoder.length, dtype=torch.int64)
    axes = {key: {0: "batch", 1: "sequence"} for key in examples}
    outputs = ["last_hidden_state"]
    if kind != "T5EncoderModel":
        hidden = [f"hidden_states.{i}" for i in range(module.config.num_hidden_layers + 1)]
        projects = kind == "CLIPTextModelWithProjection"
        outputs = [*(["text_embeds"] if projects else []), *outputs, *([] if projects else ["pooler_output"]), *hidden]
    return Component(name, name, config, module, _outputs_of(outputs), examples, outputs, axes)


def _check_vocabulary(layout: Layout, encoder: TextEncoder, embeddings: int) -> None:
    token, number = max(layout.tokenizer(encoder.tokenizer).get_vocab().items(), key=lambda item: item[1])
    if number >= embeddings:
        raise InvalidInputError(
            f"{layout.folder / encoder.tokenizer}: token '{token}' has the id {number}, but {encoder.graph} has "
            f"{embeddings} embeddings (vocab_size); they come from different models"
        )


def _outputs_of(names: list[str]) -> Callable[[nn.Module, Tensors], tuple[torch.Tensor, ...]]:
    def forward(module: nn.Module, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        hidden = any(name.startswith("hidden_states.") for name in names)
        found = module(**inputs, output_hidden_states=hidden)
        values = []
        for name in names:
            kind, _, index = name.partition(".")
            values.append(found[kind][int(index)] if index else found[kind])
        return tuple(values)

    return forward


def _decoder(autoencoder: Autoencoder, spec: DenoiserSpec) -> Component:
    _check_supported(autoencoder.folder, autoencoder.kind, DECODER_MODELS)
    module: Any = load_diffusers_model(autoencoder.folder, autoencoder.kind, optional=ENCODER)
    for part, child in list(module.named_children()):
        if part == "encoder" or any(parameter.is_meta for parameter in child.parameters()):
            delattr(module, part)  # not needed for decoding, and some files lack it
    axes = {"latent_sample": {0: "batch", 2: "latent_height", 3: "latent_width"}}
    name, config = autoencoder.component, autoencoder.config
    return Component(DECODER, name, config, module, _decode, _example_latents(spec), ["sample"], axes)


def _decode(module: Any, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    return (module.decode(inputs["latent_sample"], return_dict=False)[0],)


def _custom_decoder(module: nn.Module, spec: DenoiserSpec) -> Component:
    def decode(decoder: nn.Module, inputs: Tensors) -> tuple[torch.Tensor, ...]:
        return (decoder(inputs["latent_sample"]),)

    axes = {"latent_sample": {0: "batch"}}
    return Component(DECODER, DECODER, {}, module, decode, _example_latents(spec), ["sample"], axes)


def _example_latents(spec: DenoiserSpec) -> Tensors:
    """Return random latents in the decoder's scale."""
    noise = torch.randn(2, *spec.sample_shape, generator=torch.Generator().manual_seed(0))
    return {"latent_sample": noise / spec.latent_scale + spec.latent_shift}


def text_inputs(checkpoint: Checkpoint, encoder: Component, prompts: Sequence[str]) -> list[dict[str, np.ndarray]]:
    """Return the inputs of a text encoder for prompts, in batches."""
    assert checkpoint.source.pipeline_folder is not None  # else it has no text encoders
    layout = read_layout(checkpoint.source.pipeline_folder)
    described = next(one for one in checkpoint.spec.conditioning.encoders if one.graph == encoder.name)
    ids, mask, _ = tokenize(layout.tokenizer(described.tokenizer).backend_tokenizer, prompts, described)
    batches = [slice(start, start + BATCH) for start in range(0, len(prompts), BATCH)]
    return [{name: {IDS: ids, MASK: mask}[name][batch] for name in encoder.inputs} for batch in batches]


def prompt_conditions(
    checkpoint: Checkpoint, prompts: Sequence[str], encoders: Mapping[str, Component] | None = None
) -> ConditioningInputs:
    """Return the conditioning of one sample for each prompt, with the unconditional half if the plan is guided.

    Args:
        checkpoint: The checkpoint, loaded from a complete pipeline.
        prompts: The prompts.
        encoders: Text encoders in place of the checkpoint's own, by name.
    """
    cond = encode_prompts(checkpoint, prompts, encoders)
    if not is_guided(checkpoint.spec, checkpoint.spec.plan.guidance):
        return ConditioningInputs(cond)
    uncond = encode_prompts(checkpoint, None, encoders)
    return ConditioningInputs(cond, {name: np.repeat(array, len(prompts), axis=0) for name, array in uncond.items()})


def encode_prompts(
    checkpoint: Checkpoint, prompts: Sequence[str] | None, encoders: Mapping[str, Component] | None = None
) -> dict[str, np.ndarray]:
    """Encode prompts with the checkpoint's text encoders into the denoiser's text inputs, float32 [N, ...].

    Args:
        checkpoint: The checkpoint, loaded from a complete pipeline.
        prompts: N prompts; None returns the inputs of the unconditional half of guidance, [1, ...].
        encoders: Text encoders in place of the checkpoint's own, by name.

    Raises:
        InvalidInputError: The checkpoint has no text encoders.
    """
    return prompt_encoder(checkpoint, encoders)(prompts)


def prompt_encoder(
    checkpoint: Checkpoint, encoders: Mapping[str, Component] | None = None
) -> Callable[[Sequence[str] | None], dict[str, np.ndarray]]:
    """Open tokenizers and text encoders, and return `encode_prompts` as a function of the prompts alone."""
    conditioning = checkpoint.spec.conditioning
    if checkpoint.source.pipeline_folder is None or not conditioning.encoders:
        raise InvalidInputError(
            "the model is conditioned on text but its text encoders are missing; load the whole pipeline's folder"
        )
    layout = read_layout(checkpoint.source.pipeline_folder)
    tokenizers = {e.tokenizer: layout.tokenizer(e.tokenizer).backend_tokenizer for e in conditioning.encoders}
    given = dict(encoders or {})
    opened = {e.graph: given.get(e.graph) or load_component(checkpoint, e.graph) for e in conditioning.encoders}
    size = checkpoint.spec.image_size

    def encoded(prompts: Sequence[str] | None) -> dict[str, np.ndarray]:
        if prompts is None:
            return unconditional(None, 1, conditioning, opened, tokenizers, size)
        return encode(prompts, conditioning, opened, tokenizers, size)

    return encoded


def _encoder_outputs(spec: DenoiserSpec) -> list[tuple[str, ...]]:
    return [row for entry in spec.conditioning.inputs.values() for row in entry.rows if not isinstance(row, int)]


def _check_supported(folder: Path, kind: str, supported: tuple[str, ...]) -> None:
    if kind not in supported:
        raise InvalidInputError(
            f"{folder / 'config.json'}: class '{kind}' is not supported (supported: {', '.join(supported)})"
        )
