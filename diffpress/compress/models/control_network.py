"""A ControlNet as a component: its residuals are added to the skip connections of a U-Net (Zhang et al. 2023).

    controlnet    sample, timestep, text inputs of the denoiser, control_image f32 [B, C, H, W] in 0 .. 1  ->
                      down_block_residual_0 ... [B, c, h, w], one for each skip connection, and mid_block_residual

The residuals come from convolutions of 1x1. If the U-Net was pruned since, these compute only the channels that its
skip connections kept: the same values as those of the whole ControlNet. A skip connection of a removed block is what
the block before it wrote, and gets its residual there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import dummy_inputs, dynamic_axes, small_spec
from diffpress.compress.models.components import Component, Tensors
from diffpress.compress.models.kept_indices import KeptIndices
from diffpress.compress.models.removed_blocks import RemovedBlock
from diffpress.compress.sources.controlnet import ControlSource
from diffpress.compress.sources.pretrained import load_diffusers_model
from diffpress.runtime.image_inputs.control import CONTROL_IMAGE, residual_names

ADDED = ("text_embeds", "time_ids")  # text inputs of SDXL besides the text states
EXAMPLES = 2


def load_controlnet(checkpoint: Checkpoint, source: ControlSource, fixed_size: bool = False) -> Component:
    """Load a ControlNet to run or to export, with residuals of the U-Net's widths.

    `fixed_size` fixes height and width to the spec's.

    Raises:
        InvalidInputError: Its weights cannot be read.
    """
    module: Any = load_diffusers_model(source.folder, source.kind)
    _keep_channels_(module, checkpoint.model, checkpoint.kept_indices)
    spec = checkpoint.spec if fixed_size else small_spec(checkpoint.model, checkpoint.spec)
    read = ("sample", "timestep", *checkpoint.spec.conditioning.inputs)
    examples = {name: tensor for name, tensor in dummy_inputs(spec, EXAMPLES).items() if name in read}
    axes = {name: dims for name, dims in dynamic_axes(checkpoint.model, spec, fixed_size).items() if name in read}
    generator = torch.Generator().manual_seed(0)
    channels = module.config.conditioning_channels
    examples[CONTROL_IMAGE] = torch.rand(EXAMPLES, channels, *spec.image_size, generator=generator)
    axes[CONTROL_IMAGE] = {0: "batch"} | ({} if fixed_size else {2: "image_height", 3: "image_width"})
    outputs = residual_names(len(module.controlnet_down_blocks))
    return Component(source.name, source.name, source.config, module, _residuals, examples, outputs, axes)


def _residuals(module: Any, inputs: Tensors) -> tuple[torch.Tensor, ...]:
    added = {name: inputs[name] for name in ADDED if name in inputs}
    down, mid = module(
        inputs["sample"],
        inputs["timestep"],
        inputs["encoder_hidden_states"],
        inputs[CONTROL_IMAGE],
        added_cond_kwargs=added or None,
        return_dict=False,
    )
    return *down, mid


def _keep_channels_(controlnet: Any, unet: nn.Module, kept: KeptIndices) -> None:
    """Remove the residual channels that the skip connections of a pruned U-Net have not."""
    layers = [*controlnet.controlnet_down_blocks, controlnet.controlnet_mid_block]
    for layer, weight in zip(layers, _written_by(unet), strict=True):
        indices = kept.get(weight, {}).get(0)
        if indices is not None:
            rows = torch.from_numpy(indices)
            layer.weight, layer.bias = (nn.Parameter(p[rows], requires_grad=False) for p in (layer.weight, layer.bias))
            layer.out_channels = len(indices)


def _written_by(unet: Any) -> Iterator[str]:
    """Yield the weight of the last layer that writes each skip connection, and then that of the middle's output."""
    last = "conv_in.weight"
    yield last
    for number, block in enumerate(unet.down_blocks):
        for index, resnet in enumerate(block.resnets):
            last = last if isinstance(resnet, RemovedBlock) else f"down_blocks.{number}.resnets.{index}.conv2.weight"
            yield last
        for index, _ in enumerate(block.downsamplers or ()):
            last = f"down_blocks.{number}.downsamplers.{index}.conv.weight"
            yield last
    for index, resnet in enumerate(getattr(unet.mid_block, "resnets", ())):
        last = last if isinstance(resnet, RemovedBlock) else f"mid_block.resnets.{index}.conv2.weight"
    yield last
