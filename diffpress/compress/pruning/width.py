"""`width`: remove channels and attention heads over coupled groups, in three steps.

1. importance  I_c of channel c of a coupled group, summed over all its weights (importance.py)
2. allocation  local: the least important `ratio` of each group; global: `ratio` of all channels, removed where the
               loss of importance per saved cost is smallest. If a GroupNorm reads the group, equally many channels are
               removed from each of its normalization groups, so that the kept widths stay divisible (allocation.py)
3. removal     the channel is removed from every layer that writes or reads it (groups.py, channel_groups.py)

The family's adapter lists the inner widths of the blocks (`coupled`). If the residual stream is pruned as well, the
groups of the whole network are found in a trace of its channels, or in torch-pruning's dependency graph where the
family names the layers that this must not change (`fixed`). Of any other module nothing is known but its trace.
Attention loses complete heads, chosen by the same importance summed over a head. With a target instead of a ratio, the
smallest ratio that reaches it is searched (target.py).
"""

from __future__ import annotations

import logging
import math
from typing import Literal

from torch import nn

from diffpress.compress.checkpoint import Checkpoint, shared_copy
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import ANY_MODULE, adapter_for, dummy_inputs, small_spec
from diffpress.compress.models.counts import parameter_count
from diffpress.compress.models.diffusers_blocks import Coupled
from diffpress.compress.models.kept_indices import Removals, kept_of_both
from diffpress.compress.pruning.allocation import Candidate, allocate, choose_removed, keep_count
from diffpress.compress.pruning.channel_groups import traced_groups
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.groups import adapter_groups, dependency_graph_groups, output_pixels, remove_indices_
from diffpress.compress.pruning.importance import Importance, group_scores, importance_of, needs_gradients
from diffpress.compress.pruning.pruned import Pruned, check_runs, unshare_
from diffpress.compress.pruning.target import reach_target
from diffpress.compress.sources.layout import first_line
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

GroupsFrom = Literal["blocks", "graph", "trace"]

logger = logging.getLogger(__name__)


def prune_width(checkpoint: Checkpoint, config: PruneConfig, ctx: Context) -> Checkpoint:
    """Remove channels and heads up to `config.ratio` or `config.target`; return the smaller checkpoint.

    Raises:
        InvalidInputError: Nothing can be removed, the target cannot be reached, or the pruned model cannot be saved or
            run.
    """
    source = checkpoint.clone_model() if needs_gradients(config) else checkpoint.shared_model()
    new_importance = importance_of(source, checkpoint, config, ctx)

    def prune_by(ratio: float) -> Pruned:
        return _pruned(source, checkpoint, config, new_importance(), ratio)

    if config.target is None:
        assert config.ratio is not None  # set where there is no target
        found = prune_by(config.ratio)
    else:
        found = reach_target(checkpoint, config.target, ctx, prune_by)
    if found.skipped:
        logger.warning("prune: skipped: %s", found.skipped)
    unshare_(found.model, checkpoint.model)
    found.model.zero_grad(set_to_none=True)
    if parameter_count(found.model) == parameter_count(checkpoint.model):
        amount = "the target" if config.ratio is None else f"ratio {config.ratio:g}"
        raise InvalidInputError(
            f"prune: {amount} with round_to {config.round_to} removes nothing from this model; "
            "remove more or decrease round_to"
        )
    return checkpoint.evolve(model=found.model, kept_indices=kept_of_both(checkpoint.kept_indices, found.kept))


def _pruned(
    source: nn.Module, checkpoint: Checkpoint, config: PruneConfig, importance: Importance, ratio: float
) -> Pruned:
    """Return a pruned copy of `source`; tensors that lose nothing are shared with it."""
    groups_from = _groups_from(source, config)
    try:
        return _pruned_by(source, checkpoint, config, importance, ratio, groups_from)
    except (AssertionError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if groups_from != "graph":
            raise
        # a variant of the family in which torch-pruning's graph couples the wrong channels
        logger.warning(
            f"prune: torch-pruning fails on this {checkpoint.source.kind} ({first_line(error)}); "
            "its channels are traced instead"
        )
        return _pruned_by(source, checkpoint, config, importance, ratio, "trace")


def _groups_from(model: nn.Module, config: PruneConfig) -> GroupsFrom:
    """Return how the groups of a model are found.

    Raises:
        InvalidInputError: The residual stream must keep its width, and the blocks of the model are not known.
    """
    adapter = adapter_for(model)
    if adapter.coupled is ANY_MODULE.coupled:
        if config.residual is False:
            raise InvalidInputError(
                "prune: residual = false needs a family whose blocks are known, and a trace finds all widths of this "
                "model; remove residual"
            )
        return "trace"
    if not (adapter.residual if config.residual is None else config.residual):
        return "blocks"
    return "trace" if adapter.fixed is ANY_MODULE.fixed else "graph"


def _pruned_by(
    source: nn.Module,
    checkpoint: Checkpoint,
    config: PruneConfig,
    importance: Importance,
    ratio: float,
    groups_from: GroupsFrom,
) -> Pruned:
    adapter, model, inputs = adapter_for(source), shared_copy(source), dummy_inputs(checkpoint.spec, 2)
    removals = Removals(model)
    _prune_heads_(adapter.attentions(model), ratio, importance, removals)
    skipped = ""
    if groups_from == "trace":
        skipped = _prune_traced_(model, checkpoint.spec, config, importance, ratio, removals)
    elif groups_from == "graph":
        candidates = dependency_graph_groups(model, adapter, inputs, config, importance, removals)
        _remove_least_important_(candidates, config, ratio)
    else:
        pixels = output_pixels(model, adapter, inputs)
        groups = adapter.coupled(model) or []
        _remove_least_important_(adapter_groups(groups, config, importance, pixels, removals), config, ratio)
    adapter.refresh_(model)
    check_runs(model, inputs)
    return Pruned(model, removals.kept, skipped)


def _prune_traced_(
    model: nn.Module,
    spec: DenoiserSpec,
    config: PruneConfig,
    importance: Importance,
    ratio: float,
    removals: Removals,
) -> str:
    """Remove channels that a trace finds; return the layers that are skipped, with the reasons."""
    small = small_spec(model, spec)  # which channels are coupled does not depend on the size of the sample
    pixels = None if small == spec else output_pixels(model, adapter_for(model), dummy_inputs(spec, 2))
    inputs = dummy_inputs(small, 2)
    traced, candidates, skipped = traced_groups(model, inputs, config.round_to, ratio, importance, removals, pixels)
    _remove_least_important_(candidates, config, ratio)
    if (difference := traced.difference()) is not None:
        raise InvalidInputError(f"prune: the pruned model differs from the original: {difference}")
    return skipped


def _remove_least_important_(candidates: list[Candidate], config: PruneConfig, ratio: float) -> None:
    if config.scope == "global":
        keeps = allocate(candidates, ratio)
    else:
        keeps = [keep_count(c.channels, ratio, c.unit) for c in candidates]
    for candidate, keep in zip(candidates, keeps, strict=True):
        if keep < candidate.channels:
            candidate.remove(choose_removed(candidate.scores, keep, candidate.norm_groups))


def _prune_heads_(attentions: list[Coupled], ratio: float, importance: Importance, removals: Removals) -> None:
    """Remove heads of each attention."""
    for group in attentions:
        heads = group.channels
        keep = max(1, math.ceil(heads * (1.0 - ratio) - 1e-9))  # round up: heads are large
        if keep < heads:
            least = group_scores(group, importance).argsort(stable=True)[: heads - keep].tolist()
            remove_indices_(group, least, removals)
