"""Energy maps of a network's blocks, and the distance between those of two networks.

Widths differ after pruning, so the output f of a block is compared through its energy map e = mean over channels of
f^2, as in attention transfer (Zagoruyko & Komodakis 2017). This needs no learned projection between the two widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

Energies = dict[str, torch.Tensor]


def energy_distance(found: Mapping[str, torch.Tensor], references: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """Return the relative squared distance between energy maps [B, H, W] or [B, tokens], averaged over blocks.

    `found` has at least the blocks of `references`.
    """
    distances = [
        torch.mean((found[name] - reference) ** 2) / torch.mean(reference**2).clamp_min(1e-12)
        for name, reference in references.items()
    ]
    return torch.stack(distances).mean()


@contextmanager
def capture_energies(model: nn.Module, blocks: Sequence[str]) -> Iterator[Energies]:
    """Collect the energy maps of the named blocks in every forward pass inside the context."""
    energies: Energies = {}
    modules = dict(getattr(model, "module", model).named_modules())  # DDP wraps the model
    with ExitStack() as stack:
        for name in blocks:
            stack.callback(modules[name].register_forward_hook(_store_energy(energies, name)).remove)
        yield energies


def _store_energy(energies: Energies, name: str) -> Callable[..., None]:
    def hook(module: nn.Module, inputs: object, output: Any) -> None:
        if isinstance(output, tuple):
            # U-Net blocks return (hidden states, (skip, ...), ...), joint transformer blocks (text, hidden states)
            output = output[0] if isinstance(output[-1], tuple) or len(output) > 2 else output[-1]
        energies[name] = output.square().mean(1 if output.dim() == 4 else -1)

    return hook
