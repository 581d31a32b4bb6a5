"""What the transformer families share: a row of blocks of one width, without skips."""

from __future__ import annotations

from typing import Any

from torch import nn


def blocks(model: Any) -> list[str]:
    return [f"transformer_blocks.{i}" for i in range(len(model.transformer_blocks))]


def skip_concats(model: Any) -> list[str]:
    return []


def residual_outputs(model: Any) -> list[str]:
    return []


def cache_cuts(model: Any) -> list[str]:
    # the stream may be kept after any block: they all have its width
    return blocks(model)[:-1]


def layers_named(model: nn.Module, *, outside: tuple[str, ...], inside: tuple[str, ...] = ()) -> list[str]:
    """Linear and convolution layers whose name begins with one of `outside`, or, in a block, whose name within the
    block begins with one of `inside` ('norm1.' finds 'transformer_blocks.3.norm1.linear').
    """
    found = []
    for name, module in model.named_modules():
        if not isinstance(module, (nn.Conv2d, nn.Linear)):
            continue
        _, in_block, place = name.partition("transformer_blocks.")
        within = place.partition(".")[2]
        if within.startswith(inside) if in_block else name.startswith(outside):
            found.append(name)
    return found
