"""Adapter functions shared by the transformer families: a sequence of blocks of one width, without skips."""

from __future__ import annotations

from typing import Any

from torch import nn

from diffpress.compress.models.feature_cuts import Cut
from diffpress.compress.models.removed_blocks import RemovedBlock


def blocks(model: Any) -> list[str]:
    """Return the names of the transformer blocks."""
    return [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]


def outer_cuts(names: list[str], arguments: tuple[str, ...] = ("hidden_states",)) -> dict[str, Cut]:
    """Return the cuts of a sequence of blocks: 'outer_1' evaluates the first and the last block, 'outer_2' two each."""
    count = len(names)
    return {f"outer_{k}": Cut(names[count - k], names[k], arguments) for k in range(1, (count - 1) // 2 + 1)}


def cache_cuts(model: Any) -> dict[str, Cut]:
    """Return the cuts of a transformer of one stream, see `outer_cuts`."""
    return outer_cuts(present_blocks(model, blocks(model)))


def present_blocks(model: nn.Module, names: list[str]) -> list[str]:
    """Return the blocks that were not removed."""
    return [name for name in names if not isinstance(model.get_submodule(name), RemovedBlock)]


def layers_named(model: nn.Module, *, outside: tuple[str, ...], inside: tuple[str, ...] = ()) -> list[str]:
    """Return the names of linear and convolution layers that match a prefix.

    Layers outside the blocks match if their name starts with one of `outside`; layers inside a block match if their
    name within the block starts with one of `inside` ('norm1.' finds 'transformer_blocks.3.norm1.linear').
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        _, in_block, path = name.partition("transformer_blocks.")
        within = path.partition(".")[2]
        if within.startswith(inside) if in_block else name.startswith(outside):
            found.append(name)
    return found
