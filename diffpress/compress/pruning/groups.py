"""Coupled groups of channels, from the family's adapter or from torch-pruning's dependency graph; their removal."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from diffpress.compress.models.diffusers_blocks import Coupled, Member
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.models.kept_indices import Removals
from diffpress.compress.pruning.allocation import Candidate
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.importance import Importance, group_scores

LAYERS = (nn.Conv2d, nn.Linear)


def dependency_graph_groups(
    model: nn.Module,
    adapter: Adapter,
    inputs: dict[str, torch.Tensor],
    config: PruneConfig,
    importance: Importance,
    removals: Removals,
) -> list[Candidate]:
    """Return the coupled groups that torch-pruning's dependency graph finds, except in fixed layers and attentions."""
    modules = dict(model.named_modules())
    fixed = [modules[name] for name in adapter.fixed(model)]
    fixed += [member.layer for heads in adapter.attentions(model) for member in heads.members if member.side == "out"]
    pixels = output_pixels(model, adapter, inputs)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=inputs, forward_fn=lambda m, x: adapter.forward(m, x), verbose=False
    )
    roots = list(_roots(graph, fixed))
    return [_graph_candidate(graph, root, prune_out, config, importance, pixels, removals) for root, prune_out in roots]


def _roots(graph: Any, ignored: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    for group in graph.get_all_groups(ignored_layers=list(ignored), root_module_types=list(LAYERS)):
        first = group[0].dep
        yield first.target.module, first.handler


def _graph_candidate(
    graph: Any,
    root: nn.Module,
    prune_out: Any,
    config: PruneConfig,
    importance: Importance,
    pixels: dict[Any, int],
    removals: Removals,
) -> Candidate:
    channels = graph.get_out_channels(root)
    group = graph.get_pruning_group(root, prune_out, idxs=list(range(channels)))
    scores, affected, norms = torch.zeros(channels), [], [1]
    for dependency, indices in group:
        layer: Any = dependency.target.module
        if isinstance(layer, nn.GroupNorm):
            norms.append(layer.num_groups)
        if not isinstance(layer, LAYERS) or len(indices) != channels:
            continue
        # dependencies list the channels in the root's order, so scores add up element by element
        incoming = _side(dependency) == "in"
        values = importance(layer.weight)
        scores += (values[:, indices].transpose(0, 1) if incoming else values[indices]).flatten(1).sum(1)
        affected.append((layer, layer.weight.numel() // layer.weight.shape[1 if incoming else 0]))

    def remove(chosen: list[int]) -> None:
        coupled = graph.get_pruning_group(root, prune_out, idxs=chosen)
        for dependency, indices in coupled:
            removals.remove(dependency.target.module, _side(dependency), indices)
        coupled.prune()

    return _candidate(scores, math.lcm(*norms), affected, config, pixels, remove)


def _side(dependency: Any) -> str:
    return "in" if dependency.handler.__name__ == "prune_in_channels" else "out"


def adapter_groups(
    groups: list[Coupled],
    config: PruneConfig,
    importance: Importance,
    pixels: dict[Any, int],
    removals: Removals,
) -> list[Candidate]:
    """Return candidates for the coupled groups that the family's adapter lists."""
    return [
        _candidate(
            group_scores(group, importance),
            group.norm_groups,
            [(m.layer, _weights_per_channel(m)) for m in group.members if m.side in ("out", "in")],
            config,
            pixels,
            partial(remove_indices_, group, removals=removals),
        )
        for group in groups
    ]


def _candidate(
    scores: torch.Tensor,
    norm_groups: int,
    affected: list[tuple[Any, int]],
    config: PruneConfig,
    pixels: dict[Any, int],
    remove: Callable[[list[int]], None],
) -> Candidate:
    """Build a candidate; `affected` lists the layers in which a channel has weights, and how many."""
    # size and time weigh the same: a channel's share of all weights plus its share of all MACs
    weights = {layer: layer.weight.numel() for layer in pixels}
    parameters, macs = sum(n for _, n in affected), sum(n * pixels.get(layer, 1) for layer, n in affected)
    total_macs = sum(size * pixels[layer] for layer, size in weights.items())
    return Candidate(
        scores,
        norm_groups if len(scores) % norm_groups == 0 else 1,
        math.lcm(config.round_to, norm_groups),
        parameters / sum(weights.values()) + macs / total_macs,
        remove,
    )


def output_pixels(model: nn.Module, adapter: Adapter, inputs: dict[str, torch.Tensor]) -> dict[Any, int]:
    """Return the number of output positions per sample of each convolution and linear layer."""
    found: dict[Any, int] = {}

    def hook(layer: nn.Module, arguments: object, out: torch.Tensor) -> None:
        channels = out.shape[1] if isinstance(layer, nn.Conv2d) else out.shape[-1]
        found[layer] = out.numel() // (out.shape[0] * channels)

    handles = [layer.register_forward_hook(hook) for layer in model.modules() if isinstance(layer, LAYERS)]
    with torch.no_grad():
        adapter.forward(model, inputs)
    for handle in handles:
        handle.remove()
    return found


def _weights_per_channel(member: Member) -> int:
    weight = member.layer.weight
    return weight.numel() // weight.shape[0 if member.side == "out" else 1] * member.width


def remove_indices_(group: Coupled, indices: list[int], removals: Removals) -> None:
    """Remove `indices` of a coupled group from all its layers, and note what they keep."""
    positions: dict[tuple[Any, str], list[int]] = {}
    for m in group.members:
        removed = [m.offset + i * m.width + j for i in indices for j in range(m.width)]
        # cut both halves of a layer together: removing the first would shift the second
        positions.setdefault((m.layer, m.side), []).extend(removed)
    for (layer, side), removed in positions.items():
        if side == "heads":
            layer.heads -= len(removed)
            continue
        removals.remove(layer, side, removed)
        if side == "norm":
            tp.prune_groupnorm_out_channels(layer, removed)
        elif isinstance(layer, nn.Conv2d):
            (tp.prune_conv_out_channels if side == "out" else tp.prune_conv_in_channels)(layer, removed)
        else:
            (tp.prune_linear_out_channels if side == "out" else tp.prune_linear_in_channels)(layer, removed)
