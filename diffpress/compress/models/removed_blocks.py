"""Blocks removed from a network: each is replaced by a module without weights that passes its hidden states on.

A residual block x + f(x) can be removed where input and output have one shape. The modules around it run unchanged, and
the skip connection of a removed block is what the block before it wrote. The last blocks of a U-Net read the hidden
states concatenated with a skip connection, [hidden; skip]; only the hidden states are passed on.

    {"down_blocks.0.resnets.1": "first", "up_blocks.0.resnets.1": "hidden", ...}        as JSON in diffpress.json

The names of all other modules stay, so weights, widths and adapters of the original layout keep theirs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from diffpress.runtime.errors import InvalidInputError

# what a removed block returns: its first input; that in a tuple; the first channels of it, which are the hidden states
# beside a skip connection; the text states and the hidden states; zeros, where the caller adds the input itself
Returned = Literal["first", "tuple", "hidden", "joint", "zeros"]


class RemovedBlock(nn.Module):
    """Stands where a block was removed.

    Attributes:
        returned: What it returns.
        channels: Channels of the hidden states, for `hidden`.
    """

    def __init__(self, returned: Returned, channels: int | None = None) -> None:
        super().__init__()
        self.returned, self.channels = returned, channels

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Return the hidden states [B, C, H, W] or [B, tokens, C] as the removed block would have returned its own."""
        if self.returned == "joint":
            return kwargs["encoder_hidden_states"], kwargs["hidden_states"]
        first: torch.Tensor = args[0] if args else next(iter(kwargs.values()))
        if self.returned == "zeros":
            return torch.zeros_like(first)
        if self.returned == "hidden":
            return first[:, : self.channels]
        return (first,) if self.returned == "tuple" else first


class Removable(NamedTuple):
    """A block that can be removed, by name, and what stands there then."""

    name: str
    returned: Returned


def removed_blocks(model: nn.Module) -> dict[str, str]:
    """Return the removed blocks by name, with what they return, as JSON."""
    return {name: module.returned for name, module in model.named_modules() if isinstance(module, RemovedBlock)}


def remove_blocks_(model: nn.Module, blocks: Iterable[Removable]) -> None:
    """Remove blocks from a model."""
    for block in blocks:
        parent, _, name = block.name.rpartition(".")
        setattr(model.get_submodule(parent), name, RemovedBlock(block.returned))
    refresh_removed_(model)


def restore_removed_blocks_(model: nn.Module, record: Any, where: str) -> None:
    """Remove the blocks that diffpress.json lists from a freshly built model.

    Raises:
        InvalidInputError: The record does not match the model; the message starts with `where`.
    """
    if not isinstance(record, dict):
        raise InvalidInputError(f"{where}: removed_blocks must be a JSON object with one entry per block")
    modules = dict(model.named_modules())
    for name, returned in record.items():
        inside = any(name.startswith(f"{outer}.") for outer in record)
        if not name or name not in modules or inside:
            raise InvalidInputError(f"{where}: removed_blocks names '{name}', which this model does not have")
        if returned not in get_args(Returned):
            raise InvalidInputError(
                f"{where}: removed_blocks: '{name}' is {returned!r}, not one of {', '.join(get_args(Returned))}"
            )
    remove_blocks_(model, [Removable(name, returned) for name, returned in record.items()])
    for name, module in model.named_modules():
        if isinstance(module, RemovedBlock) and module.returned == "hidden" and module.channels is None:
            raise InvalidInputError(
                f"{where}: removed_blocks: '{name}' reads no skip connection, so it is not 'hidden'"
            )


def refresh_removed_(model: nn.Module) -> None:
    """Update the channels that removed blocks of a U-Net pass on: those that the block before them writes."""
    if not any(isinstance(module, RemovedBlock) and module.returned == "hidden" for module in model.modules()):
        return
    for block, channels in up_blocks(model):
        for resnet in block.resnets:
            if isinstance(resnet, RemovedBlock):
                resnet.channels = channels
            else:
                channels = resnet.conv2.out_channels


def up_blocks(model: Any) -> Iterator[tuple[Any, int]]:
    """Yield the up blocks of a U-Net, each with the number of channels of the hidden states that it reads."""
    down = [resnet for block in getattr(model, "down_blocks", ()) for resnet in block.resnets]
    present = [resnet for resnet in down if not isinstance(resnet, RemovedBlock)]
    for block in getattr(model, "up_blocks", ()):
        yield block, int(present[-1].conv2.out_channels if present else model.conv_in.out_channels)
        present += [resnet for resnet in block.resnets if not isinstance(resnet, RemovedBlock)]
