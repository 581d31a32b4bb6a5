"""Adapter of diffusers' `PixArtTransformer2DModel`: PixArt-alpha and PixArt-Sigma (Chen et al. 2023, 2024)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.models import diffusers_blocks, removable_blocks, transformer
from diffpress.compress.models.description import (
    Description,
    check_task,
    square,
    text,
    text_encoder,
    without_variance,
)
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.transformer import layers_named
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import TextInput

LENGTHS = {"PixArtAlphaPipeline": 120, "PixArtSigmaPipeline": 300}


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs."""
    config = layout.config
    out_channels = config["out_channels"] or config["in_channels"]
    check_task(layout, config["in_channels"], without_variance(config["in_channels"], out_channels), {})
    length = LENGTHS[layout.pipeline]
    encoders = [text_encoder(layout, name, length, lower=True) for name, _ in layout.encoders]
    inputs = {
        "encoder_hidden_states": TextInput(
            (length, int(config["caption_channels"])), (("text_encoder.last_hidden_state",),)
        ),
        "encoder_attention_mask": TextInput((length,), (("text_encoder.attention_mask",),)),
    }
    if _is_size_conditioned(config):
        inputs["resolution"] = TextInput((2,), (("size",),))
    shape = square(config["in_channels"], config["sample_size"])
    return Description(shape, text(layout, encoders, inputs), int(config["patch_size"]), steps=20, guidance=4.5)


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network; the learned variance is dropped."""
    # expand all inputs to one batch size: tracing cannot infer otherwise that the reshapes inside agree
    batch = inputs["sample"].shape[0]
    inputs = {name: value.expand(batch, *value.shape[1:]) for name, value in inputs.items()}
    sample, size = inputs["sample"], inputs.get("resolution")
    micro = {"resolution": size, "aspect_ratio": None if size is None else size[:, :1] / size[:, 1:]}
    out: torch.Tensor = model(
        sample,
        encoder_hidden_states=inputs["encoder_hidden_states"],
        timestep=inputs["timestep"],
        added_cond_kwargs=micro,
        encoder_attention_mask=inputs["encoder_attention_mask"],
        return_dict=False,
    )[0]
    return out[:, : sample.shape[1]]  # the other channels are the learned variance


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the embedding, modulation and output layers."""
    return layers_named(model, outside=("pos_embed.", "adaln_single.", "caption_projection.", "proj_out"))


def tied_outputs(model: Any) -> list[list[str]]:
    """Return the layers whose widths the network takes from each other: it views the caption in that of the image."""
    return [["pos_embed.proj", "caption_projection.linear_2"]]


def _is_size_conditioned(config: dict[str, Any]) -> bool:
    # same rule as PixArtTransformer2DModel
    setting = config.get("use_additional_conditions")
    return bool(config["sample_size"] == 128 if setting is None else setting)


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    # not resizable: the position embedding is computed for one size
    blocks=transformer.blocks,
    sensitive_layers=sensitive_layers,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    tied_outputs=tied_outputs,
    removable_blocks=removable_blocks.transformer_blocks,
    refresh_=diffusers_blocks.refresh_,
    cache_cuts=transformer.cache_cuts,
)
