"""Coupled groups of any module, found in a trace of its channels; groups that cannot be pruned are skipped and named.

A channel is a set of coupled ids (channel_ids.py). Channels that occupy the same dimensions of the same weights form a
group. Groups that one normalization by groups reads, as after a concatenation, must shrink in proportion; they are one
candidate, whose channels fall into cells of which each loses the same fraction.

User code may contain widths as constants. So each candidate is removed from a copy once, and the copy must compute, in
every operation, what the original computes with the removed channels left out.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

from diffpress.compress.models.kept_indices import Removals
from diffpress.compress.pruning.allocation import Candidate
from diffpress.compress.pruning.channel_removal import Channels, TracedModel
from diffpress.compress.pruning.channel_trace import HEADS, OUTPUT, ChannelTrace, Slot, trace
from diffpress.compress.pruning.importance import Importance
from diffpress.runtime.errors import InvalidInputError

NORMS = (nn.LayerNorm, nn.RMSNorm)
LAYERS = (_ConvNd, nn.Linear, nn.Embedding, nn.MultiheadAttention)


@dataclass(frozen=True)
class _Group:
    """Channels in an order in which each run of `share` loses equally many, so that it keeps a multiple of `step`."""

    channels: Channels
    share: int
    step: int


def traced_groups(
    model: nn.Module,
    inputs: dict[str, torch.Tensor],
    round_to: int,
    ratio: float,
    importance: Importance,
    removals: Removals,
    pixels: Mapping[Any, int] | None = None,
) -> tuple[TracedModel, list[Candidate], str]:
    """Return the model's channels, the candidates for pruning, and the layers that are skipped with the reasons.

    Costs are those of the inputs, or of `pixels`: the output positions per sample of layers in an evaluation of another
    size.

    Raises:
        InvalidInputError: No group can be pruned.
    """
    found = trace(model.eval(), inputs)
    names = {module: name for name, module in model.named_modules()}
    found.positions |= {
        f"{names[layer]}.weight": count * len(inputs["sample"]) for layer, count in (pixels or {}).items()
    }
    _fix_unequal_shares(found)
    traced = TracedModel(model, inputs, found, removals)
    reasons: dict[int, str] = {}
    groups = _groups(traced, found, round_to)
    groups = _runnable(traced, groups, [], ratio, reasons)
    skipped = _skipped(model, traced, found, reasons)
    if not groups:
        all_outputs = "all layers write the network's output"
        raise InvalidInputError(f"prune: no channels of this model can be removed: {skipped or all_outputs}")
    return traced, [_candidate(traced, found, group, importance) for group in groups], skipped


def _fix_unequal_shares(found: ChannelTrace) -> None:
    """Fix all channels of a normalization by groups that has fixed ones among them."""
    before = -1
    fixed: set[int] = set()
    while len(fixed) != before:
        before = len(fixed)
        for ids, _, what in found.shares:
            if any(i < 0 or found.ids.reason(i) for i in ids.tolist()):
                found.ids.fix(ids, f"shares {what} with channels that cannot be removed")
                fixed.update(found.ids.roots(ids).tolist())


def _groups(traced: TracedModel, found: ChannelTrace, round_to: int) -> list[_Group]:
    """Sort the channels that can be removed into groups."""
    places: dict[int, dict[Slot, int]] = defaultdict(dict)  # channel -> its first index in each slot
    for slot, roots in traced.slots.items():
        for index, root in enumerate(roots.tolist()):
            if root >= 0 and found.ids.reason(root) is None:
                places[root].setdefault(slot, index)
    runs: dict[int, list[tuple[int, int]]] = defaultdict(list)  # channel -> the runs it is in
    for number, (ids, groups, _) in enumerate(found.shares):
        for run, members in enumerate(found.ids.roots(ids).reshape(groups, -1).tolist()):
            for root in members:
                runs[root].append((number, run))
    signatures: dict[tuple[Slot, ...], Channels] = defaultdict(list)
    for root, slots in places.items():
        signatures[tuple(slots)].append(root)
    linked = _linked(list(signatures.values()), found)
    return [_group(sets, runs, round_to) for sets in linked]


def _linked(sets: list[Channels], found: ChannelTrace) -> list[list[Channels]]:
    """Join the sets of channels that one normalization by groups reads."""
    result: list[list[Channels]] = [[channels] for channels in sets]
    for ids, _, _ in found.shares:
        roots = set(found.ids.roots(ids).tolist())
        together = [sets for sets in result if any(not roots.isdisjoint(channels) for channels in sets)]
        if len(together) > 1:
            first = together[0]
            for other in together[1:]:
                first += other
                result = [sets for sets in result if sets is not other]
    return result


def _group(sets: list[Channels], runs: dict[int, list[tuple[int, int]]], round_to: int) -> _Group:
    """Order the channels of linked sets by cells: the channels of one set that are in the same runs."""
    cells: dict[Any, Channels] = defaultdict(list)
    for number, channels in enumerate(sets):
        for root in channels:
            cells[number, tuple(sorted(runs[root]))].append(root)
    share = math.gcd(*(len(cell) for cell in cells.values()))
    # keep a multiple of `step` of every `share` channels: then the width of each set is a multiple of round_to
    step = math.lcm(*(round_to // math.gcd(round_to, len(channels) // share) for channels in sets))
    return _Group([root for cell in cells.values() for root in cell], share, step)


def _runnable(
    traced: TracedModel, groups: list[_Group], accepted: list[_Group], ratio: float, reasons: dict[int, str]
) -> list[_Group]:
    """Return the groups that can be removed together with `accepted`; note why the others cannot."""
    if not groups:
        return []
    trial = traced.copy()
    trial.remove_([root for group in [*accepted, *groups] for root in _trial_channels(group, ratio)])
    difference = trial.difference()
    if difference is None:
        return groups
    if len(groups) == 1:
        reasons |= dict.fromkeys(groups[0].channels, difference)
        return []
    half = len(groups) // 2
    first = _runnable(traced, groups[:half], accepted, ratio, reasons)
    return first + _runnable(traced, groups[half:], accepted + first, ratio, reasons)


def _trial_channels(group: _Group, ratio: float) -> Channels:
    """Return the first channels of each run: as many as scope local removes, and at least one."""
    keep = max(group.step, round(group.share * (1.0 - ratio) / group.step) * group.step)
    removed = min(max(group.share - keep, 1), group.share - 1)
    return [root for i, root in enumerate(group.channels) if i % group.share < removed]


def _candidate(traced: TracedModel, found: ChannelTrace, group: _Group, importance: Importance) -> Candidate:
    position = {root: i for i, root in enumerate(group.channels)}
    scores, parameters, macs = torch.zeros(len(position)), 0.0, 0.0
    weights = {name: p for name, p in traced.model.named_parameters() if _is_weight(traced.model, name, p)}
    totals = {name: found.positions.get(name, 0) * p.numel() for name, p in weights.items()}
    for (name, dim), roots in traced.slots.items():
        if name not in weights:
            continue
        rows = [(index, position[root]) for index, root in enumerate(roots.tolist()) if root in position]
        if rows:
            index, channel = (torch.tensor(column) for column in zip(*rows, strict=True))
            values = importance(weights[name]).movedim(dim, 0).flatten(1).sum(1)
            scores.index_add_(0, channel, values[index])
            share = weights[name].numel() // weights[name].shape[dim] * len(rows) / len(position)
            parameters, macs = parameters + share, macs + share * found.positions.get(name, 0)
    cost = parameters / max(sum(p.numel() for p in weights.values()), 1) + macs / max(sum(totals.values()), 1)
    runs = len(group.channels) // group.share
    return Candidate(
        scores, runs, runs * group.step, cost, lambda chosen: traced.remove_([group.channels[i] for i in chosen])
    )


def _is_weight(model: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    return parameter.ndim > 1 and not isinstance(model.get_submodule(name.rpartition(".")[0]), NORMS)


def _skipped(model: nn.Module, traced: TracedModel, found: ChannelTrace, reasons: dict[int, str]) -> str:
    """Return the layers whose output width stays, with the reasons; without those that write the network's output."""
    layers: dict[str, list[str]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        layer = name.partition(".parametrizations.")[0] if ".parametrizations." in name else name.rpartition(".")[0]
        owner: Any = model.get_submodule(layer)
        if parameter.ndim < 2 or not isinstance(owner, LAYERS):
            continue
        dim = 1 if isinstance(owner, nn.Embedding) or getattr(owner, "transposed", False) else 0
        roots = traced.slots.get((name, dim), np.zeros(0, dtype=int)).tolist()
        why = [reason for root in roots if (reason := found.ids.reason(root) or reasons.get(root))]
        if why and why[0] not in (HEADS, OUTPUT):
            layers[why[0]].append(layer)
    return "; ".join(f"{', '.join(dict.fromkeys(names))}: {reason}" for reason, names in layers.items())
