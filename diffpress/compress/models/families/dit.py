"""Adapter of diffusers' `DiTTransformer2DModel`: class-conditional latent transformers (Peebles & Xie 2023)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.compress.models import diffusers_blocks, transformer
from diffpress.compress.models.description import Description, check_task, square, without_variance
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.removable_blocks import transformer_blocks
from diffpress.compress.models.removed_blocks import Removable
from diffpress.compress.models.transformer import layers_named
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import Conditioning

NULL_LABEL = 1000


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs."""
    config = layout.config
    classes, out_channels = int(config["num_embeds_ada_norm"]), config["out_channels"] or config["in_channels"]
    check_task(layout, config["in_channels"], without_variance(config["in_channels"], out_channels), {})
    # the embedding has one extra row, for the dropped (null) label, which the pipeline takes to be ImageNet's
    conditioning = Conditioning("class", classes, null_label=min(classes, NULL_LABEL))
    shape = square(config["in_channels"], config["sample_size"])
    return Description(shape, conditioning, int(config["patch_size"]), steps=50, guidance=4.0)


def forward(model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network; the learned variance is dropped."""
    sample = inputs["sample"]
    out: torch.Tensor = model(sample, inputs["timestep"], class_labels=inputs["class_labels"], return_dict=False)[0]
    return out[:, : sample.shape[1]]  # the other channels are the learned variance


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the embedding, modulation and output layers."""
    return layers_named(model, outside=("pos_embed.", "proj_out_"), inside=("norm1.",))


def removable_blocks(model: nn.Module) -> list[Removable]:
    """Return all blocks but the first, whose timestep embedding the output layer reads as well."""
    return transformer_blocks(model)[1:]


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    # not resizable: the position embedding is a table for one size
    blocks=transformer.blocks,
    sensitive_layers=sensitive_layers,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    removable_blocks=removable_blocks,
    refresh_=diffusers_blocks.refresh_,
    cache_cuts=transformer.cache_cuts,
)
