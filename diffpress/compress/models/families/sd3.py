"""Adapter of diffusers' `SD3Transformer2DModel`: Stable Diffusion 3 and 3.5 (Esser et al. 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.models import diffusers_blocks, removable_blocks, transformer
from diffpress.compress.models.description import (
    Description,
    check_task,
    penultimate,
    square,
    text,
    text_encoder,
    token_limit,
)
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.feature_cuts import STREAMS, Cut
from diffpress.compress.models.transformer import layers_named, outer_cuts
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import TextInput
from diffpress.runtime.errors import InvalidInputError

T5_LENGTH = 256


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs."""
    config = layout.config
    check_task(layout, config["in_channels"], config["out_channels"] or config["in_channels"], {})
    width = int(config["joint_attention_dim"])
    # the pipeline cuts prompts of both CLIP encoders at the limit of the first tokenizer
    clip_names = [name for name, _ in layout.encoders if name != "text_encoder_3"]
    length = token_limit(layout, clip_names[0]) if clip_names else 77
    clips = [text_encoder(layout, name, length) for name in clip_names]
    t5 = [text_encoder(layout, name, T5_LENGTH) for name, _ in layout.encoders if name == "text_encoder_3"]
    _check_widths(layout, clip_names, width)
    hidden = tuple(penultimate(layout, encoder.graph) for encoder in clips)
    # without T5 the pipeline pads with T5_LENGTH rows of zeros (diffusers < 0.36: as many rows as CLIP has)
    last: tuple[str, ...] | int = ("text_encoder_3.last_hidden_state",) if t5 else T5_LENGTH
    inputs = {
        "encoder_hidden_states": TextInput((length + T5_LENGTH, width), (hidden, last)),
        "pooled_projections": TextInput(
            (int(config["pooled_projection_dim"]),), (tuple(f"{encoder.graph}.text_embeds" for encoder in clips),)
        ),
    }
    shape = square(config["in_channels"], config["sample_size"])
    conditioning = text(layout, clips + t5, inputs)
    return Description(shape, conditioning, int(config["patch_size"]), steps=28, guidance=7.0, pipeline_sigmas=False)


def _check_widths(layout: Layout, clips: list[str], width: int) -> None:
    """Check that the CLIP states side by side fit into the width of the joint attention; narrower ones are padded."""
    found = sum(int(layout.configs[name]["hidden_size"]) for name in clips)
    if found > width:
        raise InvalidInputError(
            f"{layout.folder / clips[0] / 'config.json'}: hidden_size: the CLIP text encoders return {found} features, "
            f"but joint_attention_dim of the transformer is {width}; they come from different models"
        )


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network."""
    out: torch.Tensor = model(
        hidden_states=inputs["sample"],
        encoder_hidden_states=inputs["encoder_hidden_states"],
        pooled_projections=inputs["pooled_projections"],
        timestep=inputs["timestep"],
        return_dict=False,
    )[0]
    return out


def cache_cuts(model: Any) -> dict[str, Cut]:
    """Return the cuts of both streams, see `outer_cuts`."""
    return outer_cuts(transformer.present_blocks(model, transformer.blocks(model)), STREAMS)


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the embedding, modulation and output layers."""
    outer = ("pos_embed.", "time_text_embed.", "context_embedder", "norm_out.", "proj_out")
    return layers_named(model, outside=outer, inside=("norm1.", "norm1_context."))


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    resizable=True,
    blocks=transformer.blocks,
    sensitive_layers=sensitive_layers,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    removable_blocks=removable_blocks.transformer_blocks,
    refresh_=diffusers_blocks.refresh_,
    cache_cuts=cache_cuts,
)
