"""Adapter of diffusers' `UNet2DModel`: pixel or latent U-Nets, unconditional or with class labels."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from torch import nn

from diffpress.compress.models import diffusers_blocks
from diffpress.compress.models.description import Description, square
from diffpress.compress.sources.layout import Layout
from diffpress.runtime.conditioning import Conditioning

RESIZABLE = False  # a fixed size makes the simpler, faster graph, and these models are trained for one


def describe(layout: Layout) -> Description:
    config = layout.config
    classes = int(config.get("num_class_embeds") or 0)
    conditioning = Conditioning("class", classes) if classes else Conditioning()
    levels = len(config.get("block_out_channels", ()))
    return Description(
        square(config.get("in_channels", 3), config.get("sample_size") or 32), conditioning, 2 ** max(levels - 1, 0)
    )


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    out: torch.Tensor = model(
        inputs["sample"], inputs["timestep"], class_labels=inputs.get("class_labels"), return_dict=False
    )[0]
    return out


def blocks(model: Any) -> list[str]:
    # The last module of each level: its output is what the next level, or a skip, sees.
    levels = [f"down_blocks.{i}" for i in range(len(model.down_blocks))]
    levels += ["mid_block"] if model.mid_block is not None else []
    levels += [f"up_blocks.{i}" for i in range(len(model.up_blocks))]
    return levels


def skip_concats(model: Any) -> list[str]:
    # every resnet on the way up reads the stream and a skip, concatenated
    return [f"up_blocks.{i}.resnets.{j}" for i, up in enumerate(model.up_blocks) for j in range(len(up.resnets))]


def cache_cuts(model: Any) -> list[str]:
    # what the deeper levels gave may be kept where the next shallower one reads it (DeepCache, Ma et al. 2024)
    return [f"up_blocks.{i}" for i in range(len(model.up_blocks) - 1)]


def sensitive_layers(model: nn.Module) -> list[str]:
    names = ["conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "class_embedding"]
    names += [n for n, _ in model.named_modules() if n.endswith("time_emb_proj")]
    present = dict(model.named_modules())
    return [name for name in names if present.get(name) is not None]


def fixed(model: nn.Module) -> list[str]:
    names = ["conv_out", "time_embedding.linear_1", "time_embedding.linear_2", "class_embedding"]
    present = dict(model.named_modules())
    # A resnet's inner width goes with its time projection, which stays: taking whole trunk channels instead gave a
    # faster int8 engine at the same size (and a scale-and-shift projection's two halves must not be cut unequally).
    names += [name for name in present if name.endswith("time_emb_proj")]
    return [name for name in names if present.get(name) is not None]


def attentions(model: nn.Module) -> list[Any]:
    return diffusers_blocks.attentions(model)


def residual_outputs(model: nn.Module) -> list[str]:
    return diffusers_blocks.residual_outputs(model)


def coupled(model: nn.Module) -> None:
    return None


def refresh_(model: nn.Module) -> None:
    # Up- and downsamplers check their input against `channels`; resnets keep their widths for the reader.
    for module in model.modules():
        if isinstance(module, (Upsample2D, Downsample2D)) and isinstance(module.conv, nn.Conv2d):
            module.channels, module.out_channels = module.conv.in_channels, module.conv.out_channels
        elif isinstance(module, ResnetBlock2D):
            module.in_channels, module.out_channels = module.conv1.in_channels, module.conv2.out_channels
        elif isinstance(module, Attention):
            module.inner_dim = module.inner_kv_dim = module.to_q.out_features
