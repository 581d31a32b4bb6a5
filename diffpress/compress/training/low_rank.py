"""Low-rank updates of frozen weights (LoRA, Hu et al. 2022).

    W = W_0 + B A,   A [rank, K], B [out, rank]

for weights [out, ...] of which one row has K elements (K includes the kernel). B is initialized to 0 and A to
N(0, 1 / rank), so that a first step of size e changes a weight by about e, as if it were trained itself. Only A and B
have gradients, optimizer moments and an average: at rank 16, a 3x3 convolution of 128 channels trains 14 % of its
parameters, one of 1280 channels 1.6 %.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn
from torch.func import functional_call

from diffpress.compress.models.adapter import adapter_for

Tensors = dict[str, torch.Tensor]


class LowRankUpdates(nn.Module):
    """Factors of the updates of named weights [out, ...]; the weights themselves are not part of the module."""

    def __init__(self, weights: Mapping[str, torch.Tensor], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for weight in weights.values():
            k = weight[0].numel()
            r = min(rank, k, len(weight))
            self.down.append(nn.Parameter(torch.randn(r, k, generator=generator) / r**0.5))
            self.up.append(nn.Parameter(torch.zeros(len(weight), r)))

    def updated(self, weights: Mapping[str, torch.Tensor]) -> Tensors:
        """Return W_0 + B A of the weights that the factors were made for, by name."""
        factors = zip(weights.items(), self.down, self.up, strict=True)
        return {name: weight + (up @ down).view_as(weight) for (name, weight), down, up in factors}


def evaluate_with(model: nn.Module, parameters: Mapping[str, torch.Tensor], inputs: Tensors) -> torch.Tensor:
    """Return the output of a model for inputs by name, with these tensors in place of its own parameters."""
    renamed = {f"base.{name}": tensor for name, tensor in parameters.items()}
    return cast(torch.Tensor, functional_call(_ForwardModule(model), renamed, (inputs,)))


class _ForwardModule(nn.Module):
    """The adapter's forward as a module, because `functional_call` requires a module."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, inputs: Tensors) -> torch.Tensor:
        return adapter_for(self.base).forward(self.base, inputs)
