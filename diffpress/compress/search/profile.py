"""What a network spends its multiply-accumulates on, by kind of layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.counts import count, is_large
from diffpress.compress.models.fast_path import without_fast_path

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "convolutions": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "linear layers": (nn.Linear,),
}
REST = "attention and other products"


def mac_shares(checkpoint: Checkpoint) -> dict[str, float]:
    """Return kind of layer -> share of the MACs of one evaluation; a large model is evaluated on the meta device."""
    total = count(checkpoint.model, checkpoint.spec).macs
    model, inputs = checkpoint.shared_model().eval(), dummy_inputs(checkpoint.spec, 1)
    if is_large(checkpoint.model):
        model = checkpoint.clone_model().to("meta")
        inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    found = dict.fromkeys(KINDS, 0)
    with torch.no_grad(), without_fast_path(), _counted(model, found):
        adapter_for(model).forward(model, inputs)
    shares = {kind: macs / total for kind, macs in found.items()}
    return shares | {REST: max(0.0, 1.0 - sum(shares.values()))}


@contextmanager
def _counted(model: nn.Module, found: dict[str, int]) -> Iterator[None]:
    """Add the MACs of every layer that runs to its kind."""

    def hook(kind: str) -> Any:
        def add(layer: nn.Module, _: Any, out: torch.Tensor) -> None:
            weight: Any = layer.weight
            found[kind] += out.numel() * (weight.numel() // weight.shape[0])

        return add

    handles = [
        module.register_forward_hook(hook(kind))
        for module in model.modules()
        for kind, types in KINDS.items()
        if isinstance(module, types)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
