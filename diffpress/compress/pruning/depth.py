"""`depth`: remove whole blocks, whose input then stands for their output (models/removed_blocks.py).

The blocks are named, taken from a preset (block_presets.py), or chosen by a method: recoverability (recoverability.py),
or ablation, which of the blocks that are still there removes the one with the smallest

    |f(x) - f_without(x)|^2 / (fraction of the cost that is saved by removing the block alone)

until the target is reached; for a number of blocks, the smallest error alone. f is the network before the stage, and x
are states that it visits while it samples under its own plan.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

import torch
from accelerate.utils import send_to_device
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, shared_copy
from diffpress.compress.context import Context
from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.kept_indices import without_removed
from diffpress.compress.models.removable_blocks import any_blocks, without_block
from diffpress.compress.models.removed_blocks import Removable, remove_blocks_
from diffpress.compress.progress import progress
from diffpress.compress.pruning.block_goal import Goal, open_goal, without_surplus
from diffpress.compress.pruning.block_presets import preset_blocks
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.pruned import check_runs, unshare_
from diffpress.compress.pruning.recoverability import by_recoverability
from diffpress.compress.pruning.visited_states import visited_batches
from diffpress.compress.quantization.trajectory_dataset import on_best_device
from diffpress.runtime.errors import InvalidInputError, unknown_name

logger = logging.getLogger(__name__)


def prune_depth(checkpoint: Checkpoint, config: PruneDepthConfig, ctx: Context) -> Checkpoint:
    """Remove the blocks that the settings name or choose; return the smaller checkpoint.

    Raises:
        InvalidInputError: No block can be removed, a named one does not exist, the preset is for other networks, or the
            target cannot be reached.
    """
    model, inputs = checkpoint.shared_model().eval(), dummy_inputs(checkpoint.spec, 2)
    if config.preset is not None:
        chosen = preset_blocks(model, config.preset)
    elif config.remove:
        removable = removable_blocks(checkpoint)
        chosen = [_named(name, removable, model) for name in dict.fromkeys(config.remove)]
    else:
        removable = removable_blocks(checkpoint, config)
        with open_goal(checkpoint, config, removable, ctx) as goal:
            chosen = METHODS[config.method](checkpoint, config, removable, goal, ctx)
            chosen = without_surplus(chosen, goal.is_enough)
    remove_blocks_(model, chosen)
    check_runs(model, inputs)
    unshare_(model, checkpoint.model)
    names = ctx.notes["removed_blocks"] = [block.name for block in chosen]
    logger.info(f"prune: removed {', '.join(names)}")
    present = dict(model.named_modules())
    plan = checkpoint.spec.plan
    if plan.cache is not None and plan.cache.kind == "features":
        logger.warning(
            "prune: the step cache was measured with the blocks that are removed now, and is left out; schedule it "
            "after pruning"
        )
        plan = plan.without_cache
    return checkpoint.evolve(
        model=model,
        spec=checkpoint.spec.with_plan(plan),
        kept_indices=without_removed(checkpoint.kept_indices, model),
        sparse_layers=tuple(name for name in checkpoint.sparse_layers if name in present),
    )


def removable_blocks(checkpoint: Checkpoint, config: PruneDepthConfig | None = None) -> list[Removable]:
    """Return the blocks that can be removed from the model.

    Raises:
        InvalidInputError: There are none, or fewer than `config` asks for.
    """
    model, adapter = checkpoint.shared_model().eval(), adapter_for(checkpoint.model)
    if adapter.removable_blocks is not None:
        found = adapter.removable_blocks(model)
    else:
        inputs = dummy_inputs(checkpoint.spec, 2)
        with torch.no_grad():
            found = any_blocks(model, lambda m: adapter.forward(m, inputs))
    if not found:
        raise InvalidInputError(
            f"prune: this {checkpoint.source.kind} has no block that can be removed: none returns what it reads in "
            "shape; use kind width"
        )
    if config is not None and config.blocks is not None and config.blocks > len(found):
        raise InvalidInputError(
            f"prune: blocks = {config.blocks}, but only {len(found)} blocks of this model can be removed: "
            f"{', '.join(block.name for block in found)}"
        )
    return found


def _named(name: str, removable: Sequence[Removable], model: nn.Module) -> Removable:
    known = {block.name: block for block in removable}
    if name in known:
        return known[name]
    if name in dict(model.named_modules()):
        raise InvalidInputError(
            f"prune: remove: '{name}' cannot be removed, because what it reads has another shape or other layers read "
            f"what it computes; these can: {', '.join(known)}"
        )
    raise unknown_name("prune: remove", name, known)


def _by_ablation(
    checkpoint: Checkpoint, config: PruneDepthConfig, removable: Sequence[Removable], goal: Goal, ctx: Context
) -> list[Removable]:
    """Return the blocks that are removed until it is enough, that with the smallest error per saved cost first."""
    errors_without = _ablation(checkpoint, config, ctx)
    left, chosen = list(removable), list[Removable]()
    with progress("ablation of blocks", len(removable)) as advance:
        while left and not goal.is_enough(chosen):
            errors = errors_without(chosen, left)
            scores = [error / goal.saved[block] for error, block in zip(errors, left, strict=True)]
            chosen.append(left.pop(scores.index(min(scores))))
            advance(len(chosen), chosen[-1].name)
    return chosen


def _ablation(
    checkpoint: Checkpoint, config: PruneDepthConfig, ctx: Context
) -> Callable[[Sequence[Removable], Sequence[Removable]], list[float]]:
    """Return a function (removed, candidates) -> the squared error of the output without each candidate as well."""
    batches = visited_batches(checkpoint, config.samples, ctx)
    forward = adapter_for(checkpoint.model).forward

    def evaluate(model: nn.Module) -> torch.Tensor:
        device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
        with torch.no_grad():
            return torch.cat([forward(model, send_to_device(inputs, device)) for inputs in batches])

    original, batch = checkpoint.model.eval(), len(batches[0]["sample"])
    with on_best_device(original, batch) as whole:
        expected = evaluate(whole)

    def errors(removed: Sequence[Removable], candidates: Sequence[Removable]) -> list[float]:
        with on_best_device(original, batch) as whole:
            trial, found = shared_copy(whole), []
            remove_blocks_(trial, removed)
            for block in candidates:
                with without_block(trial, block):
                    found.append(float((evaluate(trial) - expected).square().mean()))
        return found

    return errors


METHODS = {"ablation": _by_ablation, "recoverability": by_recoverability}
