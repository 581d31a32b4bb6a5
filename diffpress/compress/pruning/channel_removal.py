"""Remove channels from a model and everything that stores them, and check that the code still does the same."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.utils.parametrizations import _SpectralNorm
from torch.nn.utils.parametrize import ParametrizationList
from torch.nn.utils.spectral_norm import SpectralNorm

from diffpress.compress.checkpoint import shared_copy
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.kept_indices import Removals
from diffpress.compress.models.widths import refresh_sizes_, replace_tensors_
from diffpress.compress.pruning.channel_ids import FREE, Ids
from diffpress.compress.pruning.channel_trace import ChannelTrace, trace

Channels = list[int]  # roots of coupled ids


class TracedModel:
    """A model and its channels; removes channels from both, and notes what the tensors keep."""

    def __init__(
        self, model: nn.Module, inputs: dict[str, torch.Tensor], traced: ChannelTrace, removals: Removals | None = None
    ) -> None:
        self.model, self._inputs, self._traced = model, inputs, traced
        self.slots = {slot: traced.ids.roots(ids) for slot, ids in traced.slots.items()}
        self._ids = dict(traced.slots)
        self._removed: set[int] = set()
        self._removals = removals or Removals(model)

    def copy(self) -> TracedModel:
        """Return a copy from which channels can be removed; it shares the tensors that lose none."""
        found = copy.copy(self)
        found.model, found.slots, found._ids = shared_copy(self.model), dict(self.slots), dict(self._ids)
        found._removed, found._removals = set(self._removed), Removals(found.model)
        return found

    def remove_(self, channels: Channels) -> None:
        """Remove channels from all weights and buffers, and from the sizes that layers store."""
        removed = np.array(sorted(channels))
        self._removed.update(channels)
        tensors: dict[str, Any] = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        new: dict[int, torch.Tensor] = {}
        for (name, dim), roots in self.slots.items():
            keep = np.flatnonzero(~np.isin(roots, removed, kind="table"))
            if len(keep) == len(roots):
                continue
            owner, _, attribute = name.rpartition(".")
            if name in tensors:
                found = new.get(id(tensors[name]), tensors[name].detach())
                new[id(tensors[name])] = found.index_select(dim, torch.from_numpy(keep).to(found.device))
                self._removals.keep(name, dim, keep)
            else:
                module: Any = self.model.get_submodule(owner)
                sizes = getattr(module, attribute)
                new_sizes = len(keep) if isinstance(sizes, int) else (*sizes[:dim], len(keep), *sizes[dim + 1 :])
                setattr(module, attribute, new_sizes)
            self.slots[name, dim], self._ids[name, dim] = roots[keep], self._ids[name, dim][keep]
        spectral = _spectral_norms(self.model)
        replace_tensors_(self.model, new)
        for module in self.model.modules():
            refresh_sizes_(module)
        _keep_spectral_norms_(self.model, spectral)

    def difference(self) -> str | None:
        """Return how the pruned model's operations differ from the original's without the channels; None if not."""
        adapter_for(self.model).refresh_(self.model)
        try:
            steps = trace(self.model, self._inputs, self._ids).steps
        except Exception as error:  # user code may raise anything
            return f"the code does not run with fewer channels: {str(error).splitlines()[0] if str(error) else error!r}"
        for (name, shapes), (other, other_shapes) in zip(self._traced.steps, steps, strict=False):
            if name != other:
                return f"with fewer channels the code calls {other} in place of {name}"
            if len(shapes) != len(other_shapes) or not all(map(self._matches, shapes, other_shapes)):
                return f"the code contains the number of channels ({name})"
        return None if len(steps) == len(self._traced.steps) else "with fewer channels the code calls other operations"

    def _matches(self, original: list[Ids | int], pruned: list[Ids | int]) -> bool:
        return len(original) == len(pruned) and all(map(self._same, original, pruned))

    def _same(self, original: Ids | int, pruned: Ids | int) -> bool:
        if isinstance(original, int):
            return isinstance(pruned, int) and original == pruned
        if (original == FREE).all():
            return not isinstance(pruned, int) and bool((pruned == FREE).all())
        kept = original[[root not in self._removed for root in self._traced.ids.roots(original).tolist()]]
        # a single remaining channel cannot be distinguished from a dimension of size 1
        return pruned == len(kept) == 1 if isinstance(pruned, int) else np.array_equal(kept, pruned)


def _spectral_norms(model: nn.Module) -> dict[Any, tuple[torch.Tensor, torch.Tensor]]:
    """Return vector u and value u^T W v of each spectral norm; the newer kind is a module, the older one a hook."""
    found: dict[Any, tuple[torch.Tensor, torch.Tensor]] = {}
    for module in model.modules():
        layer: Any = module
        if isinstance(layer, ParametrizationList) and isinstance(layer[0], _SpectralNorm) and layer.original.ndim > 1:
            norm: Any = layer[0]
            u, v, matrix = norm._u, norm._v, norm._reshape_weight_to_matrix(layer.original.detach())
            found[norm] = u, torch.vdot(u, matrix @ v)
        for hook in layer._forward_pre_hooks.values():
            if isinstance(hook, SpectralNorm):
                u, v = getattr(layer, f"{hook.name}_u"), getattr(layer, f"{hook.name}_v")
                matrix = hook.reshape_weight_to_matrix(getattr(layer, f"{hook.name}_orig").detach())
                found[hook] = u, torch.vdot(u, matrix @ v)
    return found


def _keep_spectral_norms_(model: nn.Module, before: dict[Any, tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Scale u so that every u^T W v, by which a layer divides its weight, is what it was before rows were removed."""
    spectral, new = _spectral_norms(model), {}
    for norm, (u, value) in spectral.items():
        if value != before[norm][1] and value != 0:
            new[id(u)] = u * (before[norm][1] / value)
    replace_tensors_(model, new)
