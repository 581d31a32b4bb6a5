"""The `prune` stage: remove channels, blocks, single weights or ranks. One table of the kinds."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffpress.compress.config import StageConfig, union_by_kind
from diffpress.compress.lazy import lazy
from diffpress.compress.pruning.config import (
    PruneConfig,
    PruneDepthConfig,
    PruneLowRankConfig,
    PruneSparsityConfig,
)

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.compress.context import Context
    from diffpress.compress.dry_run import Estimate
    from diffpress.compress.effort import Work


@dataclass(frozen=True)
class PruneDef:
    """One kind of pruning.

    Attributes:
        config: Its settings; the field `kind` has the kind's name as its default.
        run: (checkpoint, config, context) -> smaller checkpoint.
        estimate: As that of a stage (compress/stages.py).
        work: As that of a stage.
    """

    config: type[StageConfig]
    run: Callable[[Checkpoint, Any, Context], Checkpoint]
    estimate: Callable[[Estimate, Any, int], Estimate]
    work: Callable[[Any, Checkpoint, int | None], Work | None]


_HERE = "diffpress.compress.pruning"
KINDS: dict[str, PruneDef] = {
    "width": PruneDef(
        PruneConfig,
        lazy(f"{_HERE}.width:prune_width"),
        lazy("diffpress.compress.dry_run:estimate_width"),
        lazy("diffpress.compress.effort:work_of_width"),
    ),
    "depth": PruneDef(
        PruneDepthConfig,
        lazy(f"{_HERE}.depth:prune_depth"),
        lazy("diffpress.compress.dry_run:estimate_depth"),
        lazy("diffpress.compress.effort:work_of_depth"),
    ),
    "sparsity": PruneDef(
        PruneSparsityConfig,
        lazy(f"{_HERE}.sparsity:prune_sparsity"),
        lazy("diffpress.compress.dry_run:estimate_sparsity"),
        lazy("diffpress.compress.effort:work_of_sparsity"),
    ),
    "low_rank": PruneDef(
        PruneLowRankConfig,
        lazy(f"{_HERE}.low_rank:prune_low_rank"),
        lazy("diffpress.compress.dry_run:estimate_low_rank"),
        lazy("diffpress.compress.effort:work_of_low_rank"),
    ),
}
DEFAULT_KIND = "width"

# settings of any kind
AnyPruneConfig: Any = union_by_kind([entry.config for entry in KINDS.values()], DEFAULT_KIND)


AnyPrune = PruneConfig | PruneDepthConfig | PruneSparsityConfig | PruneLowRankConfig


def prune(checkpoint: Checkpoint, config: AnyPrune, ctx: Context) -> Checkpoint:
    """Return a smaller or sparser checkpoint, pruned by `config.kind`."""
    return KINDS[config.kind].run(checkpoint, config, ctx)


def estimate_prune(estimate: Estimate, config: AnyPrune, seed: int) -> Estimate:
    """Return the sizes after pruning by `config.kind`."""
    return KINDS[config.kind].estimate(estimate, config, seed)


def work_of_prune(config: AnyPrune, checkpoint: Checkpoint, teacher_samples: int | None) -> Work | None:
    """Return the network evaluations of pruning by `config.kind`."""
    return KINDS[config.kind].work(config, checkpoint, teacher_samples)
