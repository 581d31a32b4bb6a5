"""Structured channel pruning over coupled groups, in three steps.

1. importance  I_c of channel c of a coupled group, summed over all its weights (importance.py)
2. allocation  local: the least important `ratio` of each group; global: `ratio` of all channels, removed where the
               loss of importance per saved cost is smallest. If a GroupNorm reads the group, equally many channels are
               removed from each of its normalization groups, so that the kept widths stay divisible (allocation.py)
3. removal     the channel is removed from every layer that writes or reads it (groups.py, channel_groups.py)

The family's adapter lists the coupled groups (`coupled`), or leaves them to torch-pruning's dependency graph and names
the layers that it must not change (`fixed`). The groups of any other module are found in a trace of its channels.
Attention loses complete heads, chosen by the same importance summed over a head.
"""

from __future__ import annotations

import logging
import math

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import ANY_MODULE, adapter_for, dummy_inputs
from diffpress.compress.models.diffusers_blocks import Coupled
from diffpress.compress.models.families.contract import Adapter
from diffpress.compress.pruning.allocation import allocate, choose_removed, keep_count
from diffpress.compress.pruning.channel_groups import traced_groups
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.groups import adapter_groups, dependency_graph_groups, output_pixels, remove_indices_
from diffpress.compress.pruning.importance import Importance, group_scores, importance_of
from diffpress.compress.sources.layout import first_line
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)


def prune(checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> Checkpoint:
    """Remove the fraction `config.ratio` of channels and heads; return the smaller checkpoint.

    Raises:
        InvalidInputError: Nothing can be removed, or the pruned model cannot be saved or run.
    """
    adapter = adapter_for(checkpoint.model)
    by_trace = adapter.fixed is ANY_MODULE.fixed
    try:
        model, removed = _pruned(checkpoint, config, ctx, by_trace)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if by_trace:
            raise
        # a variant of the family in which torch-pruning's graph couples the wrong channels
        logger.warning(
            f"prune: torch-pruning fails on this {checkpoint.source.kind} ({first_line(error)}); "
            "its channels are traced instead"
        )
        model, removed = _pruned(checkpoint, config, ctx, by_trace=True)
    if removed == 0:
        raise InvalidInputError(
            f"prune: ratio {config.ratio:g} with round_to {config.round_to} removes nothing from this model; "
            "increase ratio or decrease round_to"
        )
    return checkpoint.evolve(model=model)


def _pruned(checkpoint: Checkpoint, config: PruneConfig, ctx: Context, by_trace: bool) -> tuple[nn.Module, int]:
    """Return a pruned copy of the model and the number of channels and heads removed."""
    adapter, model = adapter_for(checkpoint.model), checkpoint.clone_model()
    importance = importance_of(model, checkpoint, config, ctx)
    inputs = dummy_inputs(checkpoint.spec, 2)
    removed = _prune_heads_(adapter.attentions(model), config.ratio, importance)
    removed += _prune_channels_(model, adapter, inputs, config, importance, by_trace)
    adapter.refresh_(model)
    model.zero_grad(set_to_none=True)
    _check_runs(adapter, model, inputs)
    return model, removed


def _prune_channels_(
    model: nn.Module,
    adapter: Adapter,
    inputs: dict[str, torch.Tensor],
    config: PruneConfig,
    importance: Importance,
    by_trace: bool,
) -> int:
    groups, traced = adapter.coupled(model), None
    if groups is not None:
        candidates = adapter_groups(groups, config, importance, output_pixels(model, adapter, inputs))
    elif by_trace:
        traced, candidates = traced_groups(model, inputs, config, importance)
    else:
        candidates = dependency_graph_groups(model, adapter, inputs, config, importance)
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
    if traced is not None and (difference := traced.difference()) is not None:
        raise InvalidInputError(f"prune: the pruned model differs from the original: {difference}")
    return removed


def _prune_heads_(attentions: list[Coupled], ratio: float, importance: Importance) -> int:
    """Remove heads of each attention; return the number removed."""
    removed = 0
    for group in attentions:
        heads = group.channels
        keep = max(1, math.ceil(heads * (1.0 - ratio) - 1e-9))  # round up: heads are large
        if keep < heads:
            chosen = group_scores(group, importance).argsort(stable=True)[: heads - keep].tolist()
            remove_indices_(group, chosen)
            removed += len(chosen)
    return removed


def _check_runs(adapter: Adapter, model: nn.Module, inputs: dict[str, torch.Tensor]) -> None:
    with torch.no_grad():
        out = adapter.forward(model.eval(), inputs)
    if out.shape != inputs["sample"].shape or not torch.isfinite(out).all():
        raise InvalidInputError(
            f"prune: the pruned model returns {list(out.shape)}, not a finite {list(inputs['sample'].shape)}"
        )
