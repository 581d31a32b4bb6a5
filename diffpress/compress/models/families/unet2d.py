"""Adapter of diffusers' `UNet2DModel`: pixel or latent U-Nets, unconditional or with class labels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffpress.compress.models import diffusers_blocks, removable_blocks
from diffpress.compress.models.description import Description, check_entry, check_task, sample_size, square
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.feature_cuts import Cut
from diffpress.compress.models.low_rank_layers import LowRankLayer
from diffpress.compress.models.removed_blocks import refresh_removed_
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import Conditioning


def describe(layout: Layout) -> Description:
    """Read sample shape, conditioning and defaults from the pipeline's configs.

    Raises:
        InvalidInputError: The network needs another input than the sample, the timestep and class labels.
    """
    config = layout.config
    check_task(layout, config["in_channels"], config["out_channels"], {})
    check_entry(layout, "class_embed_type", (None,), "which passes class labels only")
    classes = int(config.get("num_class_embeds") or 0)
    conditioning = Conditioning("class", classes) if classes else Conditioning()
    multiple = 2 ** (len(config["block_out_channels"]) - 1)
    return Description(square(config["in_channels"], sample_size(layout)), conditioning, multiple)


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network."""
    out: torch.Tensor = model(
        inputs["sample"], inputs["timestep"], class_labels=inputs.get("class_labels"), return_dict=False
    )[0]
    return out


def blocks(model: Any) -> list[str]:
    """Return the resolution levels and the middle block."""
    levels = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
    levels += ["mid_block"] if model.mid_block is not None else []
    levels += [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    return levels


def cache_cuts(model: Any) -> dict[str, Cut]:
    """Return the up blocks but the first, from the last one on: a cached evaluation starts with their input."""
    names = [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    return {name: Cut(name) for name in reversed(names[1:])}


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the first and last convolution and the embedding and time-projection layers."""
    names = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "class_embedding"]
    names += [n for n, _ in model.named_modules() if n.endswith("time_emb_proj")]
    present = dict(model.named_modules())
    return [name for name in names if present.get(name) is not None]


def fixed(model: nn.Module) -> list[str]:
    """Return the output convolution and the embedding and time-projection layers."""
    names = ["conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "class_embedding"]
    present = dict(model.named_modules())
    # Fixing the time projections fixes the inner widths of the resnets: removing residual-stream channels instead gave
    # a faster int8 engine at the same size. The halves of a scale-and-shift projection must also stay equal.
    names += [name for name in present if name.endswith("time_emb_proj")]
    return [name for name in names if present.get(name) is not None]


def refresh_(model: nn.Module) -> None:
    """Update the widths that resamplers, resnets and attentions store; resamplers check their input against them."""
    diffusers_blocks.refresh_(model)
    for module in model.modules():
        if isinstance(module, (Upsample2D, Downsample2D)) and isinstance(module.conv, (nn.Conv2d, LowRankLayer)):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
            for resampler in (module.upsample, module.downsample):
                if isinstance(resampler, (Upsample2D, Downsample2D)):  # without a convolution of its own
                    resampler.channels = resampler.out_channels = module.in_channels
    refresh_removed_(model)


ADAPTER = Adapter(
    describe=describe,
    forward=forward,
    # not resizable: these models are trained for one size, and a fixed size makes a simpler, faster graph
    blocks=blocks,
    sensitive_layers=sensitive_layers,
    residual_outputs=diffusers_blocks.residual_outputs,
    attentions=diffusers_blocks.attentions,
    coupled=diffusers_blocks.coupled,
    residual=True,
    fixed=fixed,
    removable_blocks=removable_blocks.unet_blocks,
    refresh_=refresh_,
    cache_cuts=cache_cuts,
)
