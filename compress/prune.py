"""Structured channel pruning over coupled groups, in three steps.

1. importance  I_c of channel c of a coupled group, summed over every weight the channel touches:
       random      uniform noise
       magnitude   sum |w|
       taylor      sum |w * dL/dw|, gradients of the denoising loss accumulated over timesteps from low noise
                   upward until L_t < T * max L   (Fang et al. 2023, Diff-Pruning, eq. 5-6 and alg. 1)
2. choice      local: the least important `ratio` of each group; global: `ratio` of all channels, taken where the
               loss of importance per saved cost is least. Where a GroupNorm reads the group, the same number goes
               out of each of its normalisation groups (top-k inside each), so the kept widths stay divisible.
3. removal     every layer that writes or reads a channel of the group loses it.

Which channels are coupled, the family's adapter says (`coupled`); where it does not, torch-pruning's dependency graph
finds it out, through residual adds and skip concatenations. Attention loses whole heads, chosen by the same
importance, summed over a head.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
import torch_pruning as tp
from torch import nn

from compress.adapters import Adapter, adapter_for, example_inputs
from compress.adapters.diffusers_blocks import Coupled, Member
from compress.checkpoint import Checkpoint
from compress.config import PruneConfig
from compress.context import Context
from compress.losses import epsilon_loss
from compress.progress import progress
from compress.widths import refuse_unrecorded
from runtime.errors import BadInput

Importance = Callable[[torch.Tensor], torch.Tensor]

LAYERS = (nn.Conv2d, nn.Linear)
MIN_KEPT = 0.25


def prune(checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> Checkpoint:
    """Remove the fraction `config.ratio` of channels and heads; returns a smaller checkpoint."""
    adapter = adapter_for(checkpoint.model)
    model = checkpoint.clone_model()
    importance = _importance(model, checkpoint, config, ctx)
    inputs = example_inputs(checkpoint.spec, 2)
    removed = _prune_heads_(adapter.attentions(model), config.ratio, importance)
    removed += _prune_channels_(model, adapter, inputs, config, importance)
    if removed == 0:
        raise BadInput(
            f"prune: ratio {config.ratio:g} with round_to {config.round_to} removes nothing from this model; "
            "raise ratio or lower round_to"
        )
    refuse_unrecorded(model, {name: p.shape for name, p in checkpoint.model.named_parameters()})
    adapter.refresh_(model)
    model.zero_grad(set_to_none=True)
    _check_runs(adapter, model, inputs)
    return checkpoint.evolve(model=model)


# --- importance ------------------------------------------------------------------------------------------------


def _importance(model: nn.Module, checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> Importance:
    if config.method == "magnitude":
        return lambda weight: weight.detach().abs()
    if config.method == "random":
        generator = torch.Generator().manual_seed(ctx.seed)
        return lambda weight: torch.rand(weight.shape, generator=generator)
    _accumulate_gradients_(model, checkpoint, config, ctx)
    return lambda weight: (weight * weight.grad).detach().abs() if weight.grad is not None else torch.zeros_like(weight)


def _accumulate_gradients_(model: nn.Module, checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> None:
    data = ctx.require_data("prune: {method: taylor}")
    generator = torch.Generator().manual_seed(ctx.seed)
    x0, conditions = data.batch(config.batch, generator)
    noise = torch.randn(x0.shape, generator=generator)
    top = len(checkpoint.spec.schedule)
    timesteps = torch.linspace(0, top - 1, config.timesteps).long()
    largest = 0.0
    with progress("taylor importance", len(timesteps)) as advance:
        for done, t in enumerate(timesteps.tolist()):
            step = torch.full((len(x0),), t, dtype=torch.long)
            loss = epsilon_loss(model, checkpoint.spec, x0, noise, step, conditions)
            largest = max(largest, loss.item())
            if loss.item() < config.threshold * largest:
                break  # the high-noise steps that follow say little about content
            loss.backward()
            advance(done + 1, f"loss {loss.item():.4f}")


# --- choice ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Candidate:
    """A coupled group of channels: a score [C] for each channel, the number of normalisation groups its channels
    fall into, the unit that it shrinks by, what one channel costs, and how channels are removed, by their indices."""

    scores: torch.Tensor
    norm_groups: int
    unit: int
    cost: float
    remove: Callable[[list[int]], None]

    @property
    def channels(self) -> int:
        return len(self.scores)


def keep_count(channels: int, ratio: float, unit: int) -> int:
    """Channels to keep: (1 - ratio) of them, rounded to a multiple of `unit`; BadInput where that is none."""
    wanted = round(channels * (1.0 - ratio) / unit) * unit
    if wanted == 0 and unit < channels:
        raise BadInput(
            f"prune: ratio {ratio:g} leaves nothing of a layer with {channels} channels, which go in units of {unit}; "
            f"the most is {1 - unit / channels:.2f}"
        )
    return min(channels, max(unit, wanted))


def choose_removed(scores: torch.Tensor, keep: int, groups: int) -> list[int]:
    """Indices [C - keep] of the least important channels, equally many from each of `groups` runs of channels."""
    order = _least_first(scores, groups)
    return sorted(order[:, : order.shape[1] - keep // groups].flatten().tolist())


def _least_first(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Indices [groups, C / groups] of each of `groups` runs of channels, the least important first."""
    order = scores.reshape(groups, -1).argsort(dim=1, stable=True)
    return order + torch.arange(groups)[:, None] * order.shape[1]


def allocate(candidates: list[Candidate], ratio: float) -> list[int]:
    """Channels to keep of each candidate, so that `ratio` of all channels go where a cost unit hurts least.

    Units are removed one by one in the order of score lost per cost saved; a group keeps a quarter of itself.
    """
    channels = sum(candidate.channels for candidate in candidates)
    keeps = [candidate.channels for candidate in candidates]
    prices = [_prices(candidate) for candidate in candidates]
    offers = [(price, i) for i, further in enumerate(prices) for price in islice(further, 1)]
    heapq.heapify(offers)
    removed = 0
    while removed < ratio * channels:
        if not offers:
            possible = removed / max(channels, 1)
            raise BadInput(f"prune: ratio {ratio:g} leaves too little of some layer; at most {possible:.2f} can go")
        _, best = heapq.heappop(offers)
        keeps[best] -= candidates[best].unit
        removed += candidates[best].unit
        for price in islice(prices[best], 1):
            heapq.heappush(offers, (price, best))
    return keeps


def _prices(candidate: Candidate) -> Iterator[float]:
    """Score lost per cost saved by each further unit, down to the quarter that stays."""
    scores, gone = candidate.scores, torch.zeros(candidate.channels, dtype=torch.bool)
    order, lost = _least_first(scores, candidate.norm_groups), torch.zeros(())
    for keep in range(candidate.channels - candidate.unit, -1, -candidate.unit):
        if keep < max(candidate.unit, candidate.channels * MIN_KEPT):
            return
        gone[order[:, : order.shape[1] - keep // candidate.norm_groups]] = True
        before, lost = lost, scores[gone].sum()
        yield float(lost - before) / (candidate.unit * candidate.cost)


# --- candidates ------------------------------------------------------------------------------------------------


def _graph_candidates(
    model: nn.Module, adapter: Adapter, inputs: dict[str, torch.Tensor], config: PruneConfig, importance: Importance
) -> list[Candidate]:
    """Every coupled group that torch-pruning's dependency graph finds, outside fixed layers and attention."""
    modules = dict(model.named_modules())
    fixed = [modules[name] for name in adapter.fixed(model)]
    fixed += [member.layer for heads in adapter.attentions(model) for member in heads.members if member.side == "out"]
    pixels = _output_pixels(model, adapter, inputs)
    graph = tp.DependencyGraph().build_dependency(
        model, example_inputs=inputs, forward_fn=lambda m, x: adapter.forward(m, x), verbose=False
    )
    roots = list(_roots(graph, fixed))
    return [_graph_candidate(graph, root, prune_out, config, importance, pixels) for root, prune_out in roots]


def _roots(graph: Any, ignored: Iterable[nn.Module]) -> Iterator[tuple[nn.Module, Any]]:
    for group in graph.get_all_groups(ignored_layers=list(ignored), root_module_types=list(LAYERS)):
        first = group[0].dep
        yield first.target.module, first.handler


def _graph_candidate(
    graph: Any, root: nn.Module, prune_out: Any, config: PruneConfig, importance: Importance, pixels: dict[Any, int]
) -> Candidate:
    channels = graph.get_out_channels(root)
    group = graph.get_pruning_group(root, prune_out, idxs=list(range(channels)))
    scores, touched, norms = torch.zeros(channels), [], [1]
    for dependency, indices in group:
        layer: Any = dependency.target.module
        if isinstance(layer, nn.GroupNorm):
            norms.append(layer.num_groups)
        if not isinstance(layer, LAYERS) or len(indices) != channels:
            continue
        # Dependencies list this group's channels in the root's order, so scores add up element by element.
        incoming = dependency.handler.__name__ == "prune_in_channels"
        values = importance(layer.weight)
        scores += (values[:, indices].transpose(0, 1) if incoming else values[indices]).flatten(1).sum(1)
        touched.append((layer, layer.weight.numel() // layer.weight.shape[1 if incoming else 0]))

    def remove(chosen: list[int]) -> None:
        graph.get_pruning_group(root, prune_out, idxs=chosen).prune()

    return _candidate(scores, math.lcm(*norms), touched, config, pixels, remove)


def _coupled_candidates(
    groups: list[Coupled], config: PruneConfig, importance: Importance, pixels: dict[Any, int]
) -> list[Candidate]:
    return [
        _candidate(
            _scores(group, importance),
            group.norm_groups,
            [(m.layer, _weights_touched(m)) for m in group.members if m.side in ("out", "in")],
            config,
            pixels,
            partial(_remove_, group),
        )
        for group in groups
    ]


def _candidate(
    scores: torch.Tensor,
    norm_groups: int,
    touched: list[tuple[Any, int]],
    config: PruneConfig,
    pixels: dict[Any, int],
    remove: Callable[[list[int]], None],
) -> Candidate:
    """`touched`: the layers a channel has weights in, and how many."""
    # File size and time count alike: a channel's share of all weights plus its share of all MACs.
    weights = {layer: layer.weight.numel() for layer in pixels}
    parameters, macs = sum(n for _, n in touched), sum(n * pixels.get(layer, 1) for layer, n in touched)
    total_macs = sum(size * pixels[layer] for layer, size in weights.items())
    return Candidate(
        scores,
        norm_groups if len(scores) % norm_groups == 0 else 1,
        math.lcm(config.round_to, norm_groups),
        parameters / sum(weights.values()) + macs / total_macs,
        remove,
    )


def _output_pixels(model: nn.Module, adapter: Adapter, inputs: dict[str, torch.Tensor]) -> dict[Any, int]:
    """How often each layer's weight is applied to one sample: output positions of a convolution or linear layer."""
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


def _scores(group: Coupled, importance: Importance) -> torch.Tensor:
    """I_c [C]: importance of every weight that the members hold for index c."""
    scores = torch.zeros(group.channels)
    for m in group.members:
        if m.side in ("out", "in"):
            values, positions = importance(m.layer.weight), slice(m.offset, m.offset + group.channels * m.width)
            if m.side == "out":
                scores += values[positions].reshape(group.channels, -1).sum(1)
            else:
                scores += values[:, positions].reshape(len(values), group.channels, -1).sum((0, 2))
    return scores


def _weights_touched(member: Member) -> int:
    weight = member.layer.weight
    return weight.numel() // weight.shape[0 if member.side == "out" else 1] * member.width


# --- removal ---------------------------------------------------------------------------------------------------


def _prune_channels_(
    model: nn.Module, adapter: Adapter, inputs: dict[str, torch.Tensor], config: PruneConfig, importance: Importance
) -> int:
    groups = adapter.coupled(model)
    if groups is None:
        candidates = _graph_candidates(model, adapter, inputs, config, importance)
    else:
        candidates = _coupled_candidates(groups, config, importance, _output_pixels(model, adapter, inputs))
    if config.scope == "global":
        keeps = allocate(candidates, config.ratio)
    else:
        keeps = [keep_count(c.channels, config.ratio, c.unit) for c in candidates]
    removed = 0
    for candidate, keep in zip(candidates, keeps, strict=True):
        if keep < candidate.channels:
            chosen = choose_removed(candidate.scores, keep, candidate.norm_groups)
            candidate.remove(chosen)
            removed += len(chosen)
    return removed


def _prune_heads_(attentions: list[Coupled], ratio: float, importance: Importance) -> int:
    """Remove whole heads of each attention; returns how many went."""
    removed = 0
    for group in attentions:
        heads = group.channels
        keep = max(1, math.ceil(heads * (1.0 - ratio) - 1e-9))  # a head is large: never more than asked for
        if keep < heads:
            lost = _scores(group, importance).argsort(stable=True)[: heads - keep].tolist()
            _remove_(group, lost)
            removed += len(lost)
    return removed


def _remove_(group: Coupled, indices: list[int]) -> None:
    """Take `indices` of a coupled group out of each of its layers."""
    positions: dict[tuple[Any, str], list[int]] = {}
    for m in group.members:
        lost = [m.offset + i * m.width + j for i in indices for j in range(m.width)]
        # Two halves of one layer go in one cut: the first would move the second's positions.
        positions.setdefault((m.layer, m.side), []).extend(lost)
    for (layer, side), lost in positions.items():
        if side == "heads":
            layer.heads -= len(lost)
        elif side == "norm":
            tp.prune_groupnorm_out_channels(layer, lost)
        elif isinstance(layer, nn.Conv2d):
            (tp.prune_conv_out_channels if side == "out" else tp.prune_conv_in_channels)(layer, lost)
        else:
            (tp.prune_linear_out_channels if side == "out" else tp.prune_linear_in_channels)(layer, lost)


def _check_runs(adapter: Adapter, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        out = adapter.forward(model.eval(), inputs)
    if out.shape != inputs["sample"].shape or not torch.isfinite(out).all():
        raise BadInput(f"prune: the pruned model gives {list(out.shape)}, not a finite {list(inputs['sample'].shape)}")
