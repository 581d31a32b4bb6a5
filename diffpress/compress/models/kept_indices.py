"""Indices that a pruned model keeps of every dimension of the unpruned one.

    pruned[name] = unpruned[name][indices of dimension 0][:, indices of dimension 1]...

What was made for the unpruned layout, as a LoRA, is cut to the pruned one by the same indices. In JSON the indices of a
dimension are ranges: {"conv1.weight": {"0": "0-3 5 8-15"}}. Tensors and dimensions that lost nothing are not listed.
Of a layer of low rank the weight is listed, which is the product of its factors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from diffpress.compress.models.low_rank_layers import whole_shapes
from diffpress.runtime.errors import InvalidInputError

Indices = np.ndarray  # int64 [K], increasing
KeptIndices = dict[str, dict[int, Indices]]
MAX_INDICES = 10_000_000  # of a dimension; a longer range in a file is a mistake


class Removals:
    """The indices that the tensors of a model keep while channels are removed from its layers."""

    def __init__(self, model: nn.Module) -> None:
        self.kept: KeptIndices = {}
        self._names = {module: name for name, module in model.named_modules()}

    def remove(self, layer: nn.Module, side: str, positions: Iterable[int]) -> None:
        """Note that a layer or normalization will lose positions of its output (`out`) or of its input (`in`)."""
        for own, tensor in layer.named_parameters(recurse=False):
            dim = 1 if side == "in" or isinstance(layer, nn.Embedding) else 0
            if tensor.ndim > dim and not (side == "in" and own == "bias"):
                keep = np.setdiff1d(np.arange(tensor.shape[dim]), list(positions))
                self.keep(f"{self._names[layer]}.{own}", dim, keep)

    def keep(self, name: str, dim: int, indices: Indices) -> None:
        """Note that a tensor keeps only `indices` of those that it has now along `dim`."""
        dims = self.kept.setdefault(name, {})
        dims[dim] = dims[dim][indices] if dim in dims else indices


def kept_of_both(first: KeptIndices, second: KeptIndices) -> KeptIndices:
    """Return the indices that are kept of the first model if a third was pruned from the second."""
    result = {name: dict(dims) for name, dims in first.items()}
    for name, dims in second.items():
        known = result.setdefault(name, {})
        known |= {dim: known[dim][indices] if dim in known else indices for dim, indices in dims.items()}
    return result


def without_removed(kept: KeptIndices, model: nn.Module) -> KeptIndices:
    """Return the entries of the tensors that `model` has: none of blocks that were removed since."""
    shapes = whole_shapes(model)
    return {name: dims for name, dims in kept.items() if name in shapes}


def kept_to_json(kept: KeptIndices) -> dict[str, dict[str, str]]:
    """Return the ranges of every listed dimension."""
    return {name: {str(dim): _ranges(dims[dim]) for dim in sorted(dims)} for name, dims in sorted(kept.items())}


def kept_from_json(record: Any, model: nn.Module, where: str) -> KeptIndices:
    """Read `kept_to_json`'s object for a model of the pruned widths.

    Raises:
        InvalidInputError: The indices do not match the model; the message starts with `where`.
    """
    if not isinstance(record, Mapping):
        raise InvalidInputError(f"{where}: kept_indices must be a JSON object with one entry per tensor")
    shapes = whole_shapes(model)
    found: KeptIndices = {}
    for name, dims in record.items():
        shape = shapes.get(name, ())
        for dim, text in dims.items() if isinstance(dims, Mapping) else [("", "")]:
            indices = _indices(text) if str(dim).isdecimal() and int(dim) < len(shape) else None
            if indices is None or len(indices) != shape[int(dim)]:
                raise InvalidInputError(f"{where}: kept_indices of '{name}' do not match this model's widths")
            found.setdefault(name, {})[int(dim)] = indices
    return found


def cut_buffers_(model: nn.Module, record: Any) -> None:
    """Cut the buffers that no checkpoint saves, such as position tables, at the indices of `kept_to_json`'s object.

    A freshly built model computes them for its unpruned widths. What does not match is left to `kept_from_json`.
    """
    tables = _unsaved_buffers(model)
    cut: dict[int, torch.Tensor] = {}  # several modules may hold one table, which is recorded under one name
    for name, module, own in tables:
        dims = record.get(name) if isinstance(record, Mapping) else None
        table = module.get_buffer(own)
        for dim, text in dims.items() if isinstance(dims, Mapping) else ():
            now = cut.get(id(table), table)
            indices = _indices(text) if str(dim).isdecimal() and int(dim) < now.ndim else None
            if indices is not None and indices[-1] < now.shape[int(dim)]:
                cut[id(table)] = now.index_select(int(dim), torch.from_numpy(indices).to(now.device))
    for _, module, own in tables:
        module._buffers[own] = cut.get(id(module._buffers[own]), module._buffers[own])


def kept_of_unsaved(kept: KeptIndices, model: nn.Module) -> dict[str, dict[str, str]]:
    """Return the ranges of the buffers that no checkpoint saves."""
    names = {name for name, _, _ in _unsaved_buffers(model)}
    return kept_to_json({name: dims for name, dims in kept.items() if name in names})


def _unsaved_buffers(model: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return the buffers that no checkpoint saves: the full name, the module and the name in the module."""
    return [
        (f"{path}.{own}" if path else own, module, own)
        for path, module in model.named_modules()
        for own in sorted(module._non_persistent_buffers_set)
        if module._buffers.get(own) is not None
    ]


def _ranges(indices: Indices) -> str:
    runs = np.split(indices, np.flatnonzero(np.diff(indices) != 1) + 1)
    return " ".join(f"{run[0]}" if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _indices(text: Any) -> Indices | None:
    """Read ranges of increasing indices; None if they are something else."""
    if not isinstance(text, str) or not re.fullmatch(r"\d{1,9}(-\d{1,9})?( \d{1,9}(-\d{1,9})?)*", text):
        return None
    ends = [(int(run.split("-")[0]), int(run.split("-")[-1])) for run in text.split()]
    if sum(last - first + 1 for first, last in ends) > MAX_INDICES:
        return None
    indices = np.concatenate([np.arange(first, last + 1) for first, last in ends])
    return indices if (np.diff(indices) > 0).all() else None
