"""Dry run: the resolved recipe and the size of the checkpoint before and after each stage."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.distillation.config import DistillConfig
from diffpress.compress.effort import estimated_bytes, estimated_seconds, measure_cost
from diffpress.compress.models.adapter import cut_name
from diffpress.compress.models.counts import count
from diffpress.compress.pruning.config import PruneConfig, PruneDepthConfig, PruneLowRankConfig, PruneSparsityConfig
from diffpress.compress.pruning.depth import removable_blocks
from diffpress.compress.pruning.low_rank import factored_layers, with_layers
from diffpress.compress.pruning.prune import AnyPrune, prune
from diffpress.compress.quantization.components import component_formats
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, stored_bytes
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.quantization.quantize import check_keeps_sparsity
from diffpress.compress.recipe import Recipe
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.stages import STAGES
from diffpress.compress.training.captioned_images import has_captions


class Estimate(NamedTuple):
    """A checkpoint of the shapes and the plan that the run will have there, and its sizes.

    The sizes are None if they depend on what the run measures: the importance of widths, or the time of layers.
    """

    checkpoint: Checkpoint
    sizes: dict[str, int] | None


def dry_run(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe, the stage order, and the sizes before and (if predictable) after each stage.

    `seconds` and `peak_mib` of each stage are estimated from its evaluations of the network (compress/effort.py), as if
    every stage had the network of the checkpoint.
    """
    before = _sizes(checkpoint)
    estimate, cost, stages = Estimate(checkpoint, before), measure_cost(checkpoint), list[dict[str, Any]]()
    teacher_samples = _teacher_samples(checkpoint, recipe)
    for stage in recipe.stages:
        work = STAGES[stage.name].work(stage.config, estimate.checkpoint, teacher_samples)
        estimate = STAGES[stage.name].estimate(estimate, stage.config, recipe.seed)
        entry = {"name": stage.name, "config": stage.config.model_dump(mode="json"), "after": estimate.sizes}
        seconds = peak_mib = None
        if work is not None:
            seconds = round(estimated_seconds(work, cost), 1)
            peak_mib = round(estimated_bytes(work, cost, before["bytes"]) / 2**20)
        stages.append(entry | {"seconds": seconds, "peak_mib": peak_mib})
    return {"recipe": recipe.to_json(), "order": [s.name for s in recipe.stages], "before": before, "stages": stages}


def _teacher_samples(checkpoint: Checkpoint, recipe: Recipe) -> int | None:
    """Return how many samples the teacher makes as training data; None if each stage has its own number."""
    spec = checkpoint.spec
    if recipe.data is not None and (spec.conditioning.kind != "text" or has_captions(recipe.data)):
        return 0
    return None if spec.is_pixel_space else recipe.teacher_samples


def estimate_schedule(estimate: Estimate, config: ScheduleConfig, seed: int) -> Estimate:
    """Return the same sizes with the stage's plan; what is searched or measured does not change the steps."""
    if config.cache is not None and config.cache.kind != "forecast":
        cut_name(estimate.checkpoint.model, config.cache.cut or "")
    unsearched = config.model_copy(update={"search": None, "cache": None})
    planned = schedule(estimate.checkpoint, unsearched, Context(seed, Path(), estimate.checkpoint))
    return estimate._replace(checkpoint=planned)


def estimate_distill(estimate: Estimate, config: DistillConfig, seed: int) -> Estimate:
    """Return the same sizes; few-step students and those of kind guidance have a cheaper plan."""
    spec, steps = estimate.checkpoint.spec, getattr(config, "sample_steps", None)
    if steps is None and config.kind != "guidance":
        return estimate
    plan = replace(spec.plan.without_corrections, guidance=1.0)
    if steps is not None:
        plan = plan.spaced(spec.spacing, steps, spec.schedule, spec.tokens(spec.sample_shape))
    return estimate._replace(checkpoint=estimate.checkpoint.evolve(spec=spec.with_plan(plan)))


def estimate_width(estimate: Estimate, config: PruneConfig, seed: int) -> Estimate:
    """Return the sizes after removing channels; no latency is measured.

    The model is pruned, which refuses what the run will refuse and names the layers that it will skip.
    """
    if config.target is not None and config.target.latency is not None:
        return estimate._replace(sizes=None)
    # which layers can be pruned depends on the model alone, and this criterion needs no data
    pruned = _pruned(estimate, config.model_copy(update={"method": "magnitude", "threshold": None}), seed)
    return Estimate(pruned, None if config.scope == "global" else estimate.sizes and _sizes(pruned))


def estimate_depth(estimate: Estimate, config: PruneDepthConfig, seed: int) -> Estimate:
    """Return the sizes after removing blocks, which neither ablation nor recoverability chooses here."""
    if not (config.remove or config.preset):
        removable_blocks(estimate.checkpoint, config)
        return estimate._replace(sizes=None)
    pruned = _pruned(estimate, config, seed)
    return Estimate(pruned, estimate.sizes and _sizes(pruned))


def estimate_sparsity(estimate: Estimate, config: PruneSparsityConfig, seed: int) -> Estimate:
    """Return the same sizes with sparse layers."""
    return estimate._replace(checkpoint=_pruned(estimate, config.model_copy(update={"method": "magnitude"}), seed))


def estimate_low_rank(estimate: Estimate, config: PruneLowRankConfig, seed: int) -> Estimate:
    """Return the layers that the run chooses from; which of them are faster is measured there."""
    layers = factored_layers(estimate.checkpoint, config).layers
    return Estimate(with_layers(estimate.checkpoint, layers), None)


def _pruned(estimate: Estimate, config: AnyPrune, seed: int) -> Checkpoint:
    return prune(estimate.checkpoint, config, Context(seed, Path(), estimate.checkpoint))


def estimate_quantize(estimate: Estimate, config: QuantizeConfig, seed: int) -> Estimate:
    """Return the sizes with the weights of every quantized layer in its format."""
    model = estimate.checkpoint.model
    formats = choose_formats(model, config)
    check_keeps_sparsity(estimate.checkpoint, config)
    component_formats(estimate.checkpoint, config)
    if estimate.sizes is None:
        return estimate
    total = estimate.sizes["bytes"]
    for name, kind in formats.items():
        weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        total += stored_bytes(FORMATS[kind], weight.shape) - 4 * weight.numel()
    return estimate._replace(sizes={**estimate.sizes, "bytes": total})


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    counts = count(checkpoint.model, checkpoint.spec)
    return {"parameters": counts.parameters, "macs": counts.macs, "bytes": counts.fp32_bytes}
