"""Blocks that can be removed from a network, by family: those whose input can stand for their output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, JointTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.transformers.transformer_flux import FluxSingleTransformerBlock, FluxTransformerBlock
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from diffpress.compress.models.removed_blocks import Removable, refresh_removed_, remove_blocks_, up_blocks

NORMALIZATIONS = (nn.LayerNorm, nn.RMSNorm, nn.GroupNorm, _NormBase)


def unet_blocks(model: nn.Module) -> list[Removable]:
    """Return the residual blocks and attentions of a U-Net that write as many channels as they read."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, Transformer2DModel):
            found[name] = Removable(name, "tuple")
        elif _adds_its_input(module) and (isinstance(module, Attention) or _keeps_its_width(module)):
            found[name] = Removable(name, "first")
    for number, (block, channels) in enumerate(up_blocks(model)):
        for index, resnet in enumerate(block.resnets):
            name = f"up_blocks.{number}.resnets.{index}"
            found.pop(name, None)
            # reads [hidden; skip] and writes channels of its own
            if _adds_its_input(resnet) and resnet.conv2.out_channels == channels:
                found[name] = Removable(name, "hidden")
            channels = resnet.conv2.out_channels if isinstance(resnet, ResnetBlock2D) else channels
    return [found[name] for name, _ in model.named_modules() if name in found]


def transformer_blocks(model: nn.Module) -> list[Removable]:
    """Return the blocks of a transformer; one that writes no text states for the next stays."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, BasicTransformerBlock):
            found.append(Removable(name, "first"))
        elif isinstance(module, (FluxTransformerBlock, FluxSingleTransformerBlock)) or (
            isinstance(module, JointTransformerBlock) and not module.context_pre_only
        ):
            found.append(Removable(name, "joint"))
    return found


def any_blocks(model: nn.Module, evaluate: Callable[[nn.Module], torch.Tensor]) -> list[Removable]:
    """Return the outermost members of lists of modules that return a tensor shaped like their first input.

    A block may add its input itself or leave that to its caller: of the input and zeros, it is replaced by what changes
    the network's output less.

    Args:
        model: Any module.
        evaluate: Evaluates it on fixed inputs.
    """
    shapes: dict[str, bool] = {}

    def hook(name: str) -> Callable[..., None]:
        def check(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()), None)
            tensors = isinstance(first, torch.Tensor) and isinstance(output, torch.Tensor)
            shapes[name] = shapes.get(name, True) and tensors and first.shape == output.shape  # type: ignore[union-attr]

        return check

    members = [
        (f"{name}.{key}".lstrip("."), member)
        for name, module in model.named_modules()
        if isinstance(module, (nn.ModuleList, nn.Sequential))
        for key, member in module.named_children()
        if any(True for _ in member.parameters()) and not isinstance(member, NORMALIZATIONS)
    ]
    handles = [member.register_forward_hook(hook(name), with_kwargs=True) for name, member in members]
    try:
        expected = evaluate(model)
    finally:
        for handle in handles:
            handle.remove()

    def error(block: Removable) -> float:
        with without_block(model, block):
            try:
                return float((evaluate(model) - expected).square().mean())
            except Exception:  # user code may raise anything, such as for an attribute that the block had
                return math.inf

    found: list[Removable] = []
    for name, _ in members:  # parents come before their members
        if shapes.get(name) and not any(name.startswith(f"{outer.name}.") for outer in found):
            errors = {block: error(block) for block in (Removable(name, "first"), Removable(name, "zeros"))}
            best = min(errors, key=errors.__getitem__)
            found += [best] * math.isfinite(errors[best])
    return found


@contextmanager
def without_block(model: nn.Module, block: Removable) -> Iterator[None]:
    """Remove a block inside the context."""
    parent, _, name = block.name.rpartition(".")
    owner, module = model.get_submodule(parent), model.get_submodule(block.name)
    remove_blocks_(model, [block])
    try:
        yield
    finally:
        setattr(owner, name, module)
        refresh_removed_(model)


def _adds_its_input(module: Any) -> bool:
    """Return whether a module returns its input plus a branch, at one resolution and without scaling the sum."""
    if isinstance(module, Attention):
        return bool(module.residual_connection) and module.rescale_output_factor == 1.0
    plain = isinstance(module, ResnetBlock2D) and module.upsample is None and module.downsample is None
    return plain and module.output_scale_factor == 1.0


def _keeps_its_width(resnet: Any) -> bool:
    return resnet.conv_shortcut is None and resnet.conv1.in_channels == resnet.conv2.out_channels
