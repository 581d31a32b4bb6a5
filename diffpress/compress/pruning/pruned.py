"""What pruning makes: a smaller copy of a model that shares unchanged tensors with it, until it is kept."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.kept_indices import KeptIndices
from diffpress.compress.models.widths import replace_tensors_
from diffpress.runtime.errors import InvalidInputError


class Pruned(NamedTuple):
    """A pruned copy of a model.

    Attributes:
        model: The copy.
        kept: What its tensors keep of those of the model.
        skipped: The layers that could not be pruned, with the reasons; '' if there are none.
    """

    model: nn.Module
    kept: KeptIndices
    skipped: str


def unshare_(model: nn.Module, original: nn.Module) -> None:
    """Copy the tensors that `model` shares with `original`, so that training one leaves the other as it is."""
    shared = {id(tensor) for tensor in (*original.parameters(), *original.buffers())}
    own = [tensor for tensor in (*model.parameters(), *model.buffers()) if id(tensor) in shared]
    replace_tensors_(model, {id(tensor): tensor.detach().clone() for tensor in own})


def check_runs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    """Raise InvalidInputError if a pruned model returns another shape than it should, or values that are not finite."""
    with torch.no_grad():
        out = adapter_for(model).forward(model.eval(), inputs)
    if out.shape != inputs["sample"].shape or not torch.isfinite(out).all():
        raise InvalidInputError(
            f"prune: the pruned model returns {list(out.shape)}, not a finite {list(inputs['sample'].shape)}"
        )
