"""Channel ids through operations that move entries: views, permutations, concatenations, padding, resampling.

A view or a slice is applied to the ids themselves. Its result is read back: the dimension along which ids vary is the
channels' dimension.
"""

from __future__ import annotations

import re

import numpy as np
import torch

from diffpress.compress.pruning.channel_ids import FREE, HARD, Arguments, Ids, Trace, tensors_in


def movement(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Apply a view, permutation, slice or repetition to the ids themselves."""
    operand, *rest = (value for key, value in arguments.items() if key != "implicit")
    found: list[dict[int, Ids]] = [{} for _ in outputs]
    # `view` of the ids may need a copy where `view` of the tensor does not
    apply = torch.reshape if name in ("view", "_unsafe_view") else getattr(torch.ops.aten, name)
    for dim, ids in sorted(trace.labels(operand).axes.items()):
        if (ids == FREE).all():
            continue
        moved = apply(_along(ids, dim, operand.shape), *rest)
        for axes, one in zip(found, tensors_in([moved]), strict=True):
            _place(trace, name, axes, one)
    if name == "expand":
        for dim, size in enumerate(outputs[0].shape):
            own = dim - outputs[0].ndim + operand.ndim
            if size > 1 and (own < 0 or operand.shape[own] == 1):
                found[0][dim] = np.full(size, FREE)
    return found


def _along(ids: Ids, dim: int, shape: torch.Size) -> torch.Tensor:
    """Return ids that vary along `dim` as a tensor of `shape`."""
    sizes = [1] * len(shape)
    sizes[dim] = len(ids)
    return torch.from_numpy(ids.astype(np.int64)).view(sizes).expand(shape)


def _place(trace: Trace, name: str, axes: dict[int, Ids], moved: torch.Tensor) -> None:
    """Find the dimension along which moved ids vary; couple them if a reshape spreads them over several dimensions."""
    if moved.numel() == 0:
        return
    for dim in range(moved.ndim):
        if moved.stride(dim) == 0:
            moved = moved.narrow(dim, 0, 1)
    varying = [d for d in range(moved.ndim) if moved.shape[d] > 1 and not (moved == moved.narrow(d, 0, 1)).all()]
    if not varying:
        trace.ids.fix(moved.flatten()[:1].numpy(), f"is selected by its index ({name})")
        return
    # of [heads, width per head] the width; of [channels, 2, 2] the channels
    axis = max(varying, key=lambda d: (moved.shape[d], d))
    rows = moved.movedim(axis, -1).reshape(-1, moved.shape[axis]).unique(dim=0, sorted=False).numpy()
    first = moved.movedim(axis, -1).reshape(-1, moved.shape[axis])[0].numpy()
    trace.ids.couple_all([first, *rows], f"is reshaped ({name})")
    if axis in axes:
        trace.ids.fix(first, f"is merged with another dimension ({name})")
    else:
        axes[axis] = first


def concatenation(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Concatenate the ids along one dimension and couple them along the others."""
    parts: list[torch.Tensor] = list(arguments["tensors"])
    stacked = name == "stack"
    joined = arguments["dim"] % outputs[0].ndim
    axes: dict[int, Ids] = {}
    for dim in range(outputs[0].ndim):
        if stacked and dim == joined:
            continue
        own = dim - (stacked and dim > joined)
        rows = [trace.labels(part).axes.get(own) for part in parts if part.ndim > own]
        if all(row is None for row in rows):
            continue
        if dim == joined:
            sizes = [part.shape[own] for part in parts if part.ndim > own]
            axes[dim] = np.concatenate(
                [np.full(size, HARD) if row is None else row for row, size in zip(rows, sizes, strict=True)]
            )
        else:
            merged = trace.ids.couple_all(rows, f"is concatenated with a tensor of fixed size ({name})")  # type: ignore[arg-type]
            if merged is not None:
                axes[dim] = merged
    return [axes]


def spatial(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Keep all dimensions but the last one, two or three: pooling, resampling and padding of images."""
    x = next(iter(tensors_in(arguments.values())))
    dims = int(match[1]) if (match := re.search(r"(\d)d", name)) else 2
    axes = dict(trace.labels(x).axes)
    for dim in range(x.ndim - dims, x.ndim):
        trace.ids.fix(axes.pop(dim, None), f"is a spatial dimension ({name})")
    return [axes for _ in outputs]


def constant_pad(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Pad the ids with HARD."""
    x, axes, pad = arguments["self"], {}, list(arguments["pad"])
    for dim, ids in trace.labels(x).axes.items():
        before, after = [*pad[2 * (x.ndim - 1 - dim) :], 0, 0][:2]
        ids = ids[max(-before, 0) : len(ids) - max(-after, 0)]
        axes[dim] = np.pad(ids, (max(before, 0), max(after, 0)), constant_values=HARD)
    return [axes]


def pixel_shuffle(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Couple the r x r channels that become one; for `pixel_unshuffle`, repeat the channel that becomes r x r."""
    x, axes = arguments["self"], dict(trace.labels(arguments["self"]).axes)
    cells, channels = next(v for v in arguments.values() if isinstance(v, int)) ** 2, x.ndim - 3
    for dim in (x.ndim - 2, x.ndim - 1):
        trace.ids.fix(axes.pop(dim, None), f"is a spatial dimension ({name})")
    if channels in axes and name == "pixel_unshuffle":
        axes[channels] = np.repeat(axes[channels], cells)
    elif channels in axes:
        merged = trace.ids.couple_all(list(axes[channels].reshape(-1, cells).T), f"is reshaped ({name})")
        axes[channels] = merged  # type: ignore[assignment]
    return [axes]


def table_lookup(trace: Trace, name: str, arguments: Arguments, outputs: list[torch.Tensor]) -> list[dict[int, Ids]]:
    """Index with tensors: the indexed dimensions are fixed, the others are kept."""
    x, indices = next(iter(tensors_in(arguments.values()))), arguments["indices"]
    kept = {dim: ids for dim, ids in trace.labels(x).axes.items() if dim >= len(indices) or indices[dim] is None}
    for dim, ids in trace.labels(x).axes.items():
        if dim not in kept:
            trace.ids.fix(ids, "is selected by its index")
    axes: dict[int, Ids] = {}
    for dim, ids in kept.items():
        _place(trace, name, axes, torch.ops.aten.index(_along(ids, dim, x.shape), indices))
    return [axes]
