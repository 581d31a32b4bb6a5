"""Adapter of any `nn.Module` called as module(sample, timestep[, class_labels]) -> tensor.

Nothing is known about the inside, so the careful choice is made: the first and the last layer with weights stay
in high precision, the direct children are the blocks, and no attention heads are removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

RESIZABLE = False


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    conditions = [inputs["class_labels"]] if "class_labels" in inputs else []
    out: torch.Tensor = model(inputs["sample"], inputs["timestep"], *conditions)
    return out


def blocks(model: nn.Module) -> list[str]:
    return [name for name, child in model.named_children() if any(True for _ in child.parameters())]


def skip_concats(model: nn.Module) -> list[str]:
    return []


def residual_outputs(model: nn.Module) -> list[str]:
    return []


def cache_cuts(model: nn.Module) -> list[str]:
    return []


def sensitive_layers(model: nn.Module) -> list[str]:
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return sorted({*layers[:1], *layers[-1:]})


def fixed(model: nn.Module) -> list[str]:
    layers = [name for name, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return layers[-1:]


def attentions(model: nn.Module) -> list[Any]:
    return []


def coupled(model: nn.Module) -> None:
    return None


def refresh_(model: nn.Module) -> None:
    return None
