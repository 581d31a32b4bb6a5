"""Dry run: the resolved recipe and the size of the checkpoint before and after each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.counts import count
from diffpress.compress.pruning.config import PruneConfig
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, stored_bytes
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.recipe import Recipe
from diffpress.compress.stages import STAGES


class Estimate(NamedTuple):
    """A checkpoint of the shapes that the run will have there, and its sizes."""

    checkpoint: Checkpoint
    sizes: dict[str, int]


def dry_run(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe, the stage order, and the sizes before and (if predictable) after each stage."""
    before = _sizes(checkpoint)
    estimate: Estimate | None = Estimate(checkpoint, before)
    stages: list[dict[str, Any]] = []
    for stage in recipe.stages:
        if estimate is not None:
            estimate = STAGES[stage.name].estimate(estimate, stage.config, recipe.seed)
        sizes = None if estimate is None else estimate.sizes
        stages.append({"name": stage.name, "config": stage.config.model_dump(mode="json"), "after": sizes})
    return {"recipe": recipe.to_json(), "order": [s.name for s in recipe.stages], "before": before, "stages": stages}


def estimate_prune(estimate: Estimate, config: PruneConfig, seed: int) -> Estimate | None:
    """Return the sizes after pruning; None if the widths depend on the importance, which is measured in the run."""
    if config.scope == "global":
        return None
    # the widths depend on the ratio alone, and this criterion needs no data
    by_magnitude = config.model_copy(update={"method": "magnitude"})
    pruned = prune(estimate.checkpoint, by_magnitude, Context(seed, Path(), estimate.checkpoint))
    return Estimate(pruned, _sizes(pruned))


def estimate_quantize(estimate: Estimate, config: QuantizeConfig, seed: int) -> Estimate:
    """Return the sizes with the weights of every quantized layer in its format."""
    model = estimate.checkpoint.model
    total = estimate.sizes["bytes"]
    for name, kind in choose_formats(model, config).items():
        weight: torch.Tensor = model.get_submodule(name).weight  # type: ignore[assignment]
        total += stored_bytes(FORMATS[kind], weight.shape) - 4 * weight.numel()
    return estimate._replace(sizes={**estimate.sizes, "bytes": total})


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    counts = count(checkpoint.model, checkpoint.spec)
    return {"parameters": counts.parameters, "macs": counts.macs, "bytes": counts.fp32_bytes}
