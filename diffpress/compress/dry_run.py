"""Dry run: the resolved recipe and the size of the checkpoint before and after each stage."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.counts import count
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS, stored_bytes
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.recipe import Recipe


def dry_run(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """Return the resolved recipe, the stage order, and the sizes before and (if predictable) after each stage."""
    before = _sizes(checkpoint)
    sizes: dict[str, int] | None = before
    stages: list[dict[str, Any]] = []
    for stage in recipe.stages:
        if stage.name == "prune" and stage.config.scope == "global":
            sizes = None  # the widths depend on the importance, which is measured in the run
        elif stage.name == "prune" and sizes:
            # the widths depend on the ratio alone, and this criterion needs no data
            dry_config = stage.config.model_copy(update={"method": "magnitude"})
            checkpoint = prune(checkpoint, dry_config, Context(recipe.seed, Path(), checkpoint))
            sizes = _sizes(checkpoint)
        elif stage.name == "quantize" and sizes:
            sizes = {**sizes, "bytes": _quantized_bytes(checkpoint, stage.config)}
        stages.append({"name": stage.name, "config": stage.config.model_dump(mode="json"), "after": sizes})
    return {"recipe": recipe.to_json(), "order": [s.name for s in recipe.stages], "before": before, "stages": stages}


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    counts = count(checkpoint.model, checkpoint.spec)
    return {"parameters": counts.parameters, "macs": counts.macs, "bytes": counts.fp32_bytes}


def _quantized_bytes(checkpoint: Checkpoint, config: QuantizeConfig) -> int:
    total = count(checkpoint.model, checkpoint.spec).fp32_bytes
    for name, kind in choose_formats(checkpoint.model, config).items():
        weight: torch.Tensor = checkpoint.model.get_submodule(name).weight  # type: ignore[assignment]
        total += stored_bytes(FORMATS[kind], weight.shape) - 4 * weight.numel()
    return total
