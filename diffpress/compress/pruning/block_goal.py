"""How many blocks are removed: a number of them, or as many as a target needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.removed_blocks import Removable, remove_blocks_
from diffpress.compress.pruning.config import PruneDepthConfig
from diffpress.compress.pruning.target import open_target, unreachable

LEAST_SAVED = 1e-3  # of the cost: a block that saves nothing is the last to go

IsEnough = Callable[[Sequence[Removable]], bool]


class Goal(NamedTuple):
    """What the removed blocks have to save.

    Attributes:
        saved: Fraction of the cost that each block saves if it is removed alone; 1 per block for a number of blocks.
        to_save: The sum of `saved` at which the goal is reached; for a target this is an estimate.
        is_enough: Whether the goal is reached without these blocks.
    """

    saved: dict[Removable, float]
    to_save: float
    is_enough: IsEnough


@contextmanager
def open_goal(
    checkpoint: Checkpoint, config: PruneDepthConfig, removable: Sequence[Removable], ctx: Context
) -> Iterator[Goal]:
    """Yield the goal of the settings `blocks` or `target`.

    Raises:
        InvalidInputError: The target cannot be reached, or is a latency and no engine measures it here.
    """
    if config.target is None:
        assert config.blocks is not None
        blocks = config.blocks
        yield Goal(dict.fromkeys(removable, 1.0), float(blocks), lambda chosen: len(chosen) >= blocks)
        return
    with open_target(checkpoint, config.target, ctx) as fraction:
        most = config.target.fraction

        def remaining(blocks: Sequence[Removable]) -> float:
            smaller = checkpoint.shared_model().eval()
            remove_blocks_(smaller, blocks)
            return fraction(smaller) if blocks else 1.0

        smallest = remaining(removable)
        if smallest > most:
            raise unreachable(config.target, smallest)
        saved = {block: max(1.0 - remaining([block]), LEAST_SAVED) for block in removable}
        yield Goal(saved, 1.0 - most, lambda chosen: remaining(chosen) <= most)


def without_surplus(chosen: Sequence[Removable], is_enough: IsEnough) -> list[Removable]:
    """Return the chosen blocks, in order, less those that need not go: the last may save more than was left to save."""
    needed = list(chosen)
    for block in chosen[-2::-1]:
        fewer = [other for other in needed if other is not block]
        needed = fewer if is_enough(fewer) else needed
    return needed
