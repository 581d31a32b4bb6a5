"""`depth`: remove whole blocks, whose input then stands for their output (models/removed_blocks.py).

The blocks are named, taken from a preset (block_presets.py), or chosen by ablation: of the blocks that are still there,
remove the one with the smallest

    |f(x) - f_without(x)|^2 / (fraction of the cost that is saved by removing the block alone)

until the target is reached; for a number of blocks, the smallest error alone. f is the network before the stage, and x
are states that it visits while it samples under its own plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.kept_indices import without_removed
from diffpress.compress.models.removable_blocks import any_blocks, without_block
from diffpress.compress.models.removed_blocks import Removable, remove_blocks_
from diffpress.compress.progress import progress
from diffpress.compress.pruning.block_presets import preset_blocks
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.pruned import check_runs, keep_apart_
from diffpress.compress.pruning.target import open_target, unreachable
from diffpress.compress.pruning.visited_states import visited_batches
from diffpress.runtime.errors import InvalidInputError, unknown_name

logger = logging.getLogger(__name__)

LEAST_SAVED = 1e-3  # of the cost: a block that saves nothing is the last to go

Evaluate = Callable[[nn.Module], torch.Tensor]


def prune_depth(checkpoint: Checkpoint, config: PruneDepthConfig, ctx: Context) -> Checkpoint:
    """Remove the blocks that the settings name or choose; return the smaller checkpoint.

    Raises:
        InvalidInputError: No block can be removed, a named one does not exist, the preset is for other networks, or the
            target cannot be reached.
    """
    model, inputs = checkpoint.shared_model().eval(), dummy_inputs(checkpoint.spec, 2)
    if config.preset is not None:
        chosen = preset_blocks(model, config.preset)
    else:
        removable = _removable(checkpoint, model, inputs)
        if config.remove:
            chosen = [_named(name, removable) for name in config.remove]
        else:
            chosen = _by_ablation(checkpoint, model, removable, config, ctx)
    remove_blocks_(model, chosen)
    check_runs(model, inputs)
    keep_apart_(model, checkpoint.model)
    names = ctx.notes["removed_blocks"] = [block.name for block in chosen]
    logger.info(f"prune: removed {', '.join(names)}")
    present = dict(model.named_modules())
    return checkpoint.evolve(
        model=model,
        kept_indices=without_removed(checkpoint.kept_indices, model),
        sparse_layers=tuple(name for name in checkpoint.sparse_layers if name in present),
    )


def _removable(checkpoint: Checkpoint, model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[Removable]:
    adapter = adapter_for(model)
    listed = adapter.removable_blocks
    with torch.no_grad():
        found = any_blocks(model, lambda m: adapter.forward(m, inputs)) if listed is None else listed(model)
    if not found:
        raise InvalidInputError(
            f"prune: this {checkpoint.source.kind} has no block that can be removed: none returns what it reads in "
            "shape; use kind width"
        )
    return found


def _named(name: str, removable: Sequence[Removable]) -> Removable:
    known = {block.name: block for block in removable}
    if name not in known:
        raise unknown_name("prune: remove", name, known)
    return known[name]


def _by_ablation(
    checkpoint: Checkpoint, model: nn.Module, removable: list[Removable], config: PruneDepthConfig, ctx: Context
) -> list[Removable]:
    """Choose blocks one after the other."""
    if config.blocks is not None and config.blocks > len(removable):
        raise InvalidInputError(
            f"prune: blocks = {config.blocks}, but only {len(removable)} blocks of this model can be removed: "
            f"{', '.join(block.name for block in removable)}"
        )
    errors_without = _ablation(checkpoint, model, config, ctx)
    if config.target is None:
        return _chosen(errors_without, removable, lambda chosen: len(chosen) == config.blocks, lambda block: 1.0)
    with open_target(checkpoint, config.target, ctx) as fraction:
        most, saved = config.target.fraction, {}
        for block in removable:
            with without_block(model, block):
                saved[block] = max(1.0 - fraction(model), LEAST_SAVED)

        def remaining(blocks: Sequence[Removable]) -> float:
            smaller = checkpoint.shared_model()
            remove_blocks_(smaller, blocks)
            return fraction(smaller)

        smallest = remaining(removable)
        if smallest > most:
            raise unreachable(config.target, smallest)
        chosen = _chosen(errors_without, removable, lambda blocks: remaining(blocks) <= most, saved.__getitem__)
        for block in chosen[-2::-1]:  # the last block may have saved more than was left to save
            fewer = [other for other in chosen if other is not block]
            chosen = fewer if remaining(fewer) <= most else chosen
    return chosen


def _chosen(
    errors_without: Callable[[Sequence[Removable], Sequence[Removable]], list[float]],
    removable: Sequence[Removable],
    is_enough: Callable[[Sequence[Removable]], bool],
    saved: Callable[[Removable], float],
) -> list[Removable]:
    """Return the blocks that are removed until it is enough, that with the smallest error per saved cost first."""
    left, chosen = list(removable), list[Removable]()
    with progress("ablation of blocks", len(removable)) as advance:
        while left and not is_enough(chosen):
            errors = errors_without(chosen, left)
            scores = [error / saved(block) for error, block in zip(errors, left, strict=True)]
            chosen.append(left.pop(scores.index(min(scores))))
            advance(len(chosen), chosen[-1].name)
    return chosen


def _ablation(
    checkpoint: Checkpoint, model: nn.Module, config: PruneDepthConfig, ctx: Context
) -> Callable[[Sequence[Removable], Sequence[Removable]], list[float]]:
    """Return a function (removed, candidates) -> the squared error of the output without each candidate as well."""
    evaluate = _evaluation(checkpoint, config, ctx)
    expected = evaluate(model)

    def errors(removed: Sequence[Removable], candidates: Sequence[Removable]) -> list[float]:
        trial, found = checkpoint.shared_model().eval(), []
        remove_blocks_(trial, removed)
        for block in candidates:
            with without_block(trial, block):
                found.append(float((evaluate(trial) - expected).square().mean()))
        return found

    return errors


def _evaluation(checkpoint: Checkpoint, config: PruneDepthConfig, ctx: Context) -> Evaluate:
    """Return a function that evaluates a network on states of the checkpoint's trajectories."""
    batches = visited_batches(checkpoint, config.samples, ctx)

    def evaluate(model: nn.Module) -> torch.Tensor:
        with torch.no_grad():
            return torch.cat([adapter_for(model).forward(model, inputs) for inputs in batches])

    return evaluate
