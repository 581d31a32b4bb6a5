"""Adapter of any `nn.Module` called as module(sample, timestep[, class_labels]) -> tensor.

The structure is unknown, so the choices are conservative: the first and the last layer stay in high precision, the
direct children are the blocks, and no attention heads are pruned.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RESIZABLE = False


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Evaluate the network."""
    conditions = [inputs["class_labels"]] if "class_labels" in inputs else []
    out: torch.Tensor = model(inputs["sample"], inputs["timestep"], *conditions)
    return out


def blocks(model: nn.Module) -> list[str]:
    """Return the direct children that have parameters."""
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def skip_concats(model: nn.Module) -> list[str]:
    """Return no names: the structure is unknown."""
    return []


def residual_outputs(model: nn.Module) -> list[str]:
    """Return no names: the structure is unknown."""
    return []


def cache_cuts(model: nn.Module) -> list[str]:
    """Return no names: the structure is unknown."""
    return []


def sensitive_layers(model: nn.Module) -> list[str]:
    """Return the first and the last convolution or linear layer."""
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sorted({*layers[:1], *layers[-1:]})


def fixed(model: nn.Module) -> list[str]:
    """Return the last layer, which writes the output channels."""
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers[-1:]


def attentions(model: nn.Module) -> list[Any]:
    """Return no attentions: the structure is unknown."""
    return []


def coupled(model: nn.Module) -> None:
    """Return None: the dependency graph finds the groups."""
    return None


def refresh_(model: nn.Module) -> None:
    """Do nothing."""
    return None
