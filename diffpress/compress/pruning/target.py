"""Targets of pruning: the fraction of the network's MACs, parameters or latency that remains.

A target holds for the network before the stage. The fraction that remains falls with the fraction of channels removed,
in steps that `round_to` makes, so the smallest ratio that reaches the target is found by bisection. Latency is measured
in the engine, of every network that is tried: no count of operations predicts it.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.counts import count, parameter_count
from diffpress.compress.pruning.allocation import TooMuchRemovedError
from diffpress.compress.pruning.config import DEFAULT_ENGINE, PruneTarget
from diffpress.compress.pruning.pruned import Pruned
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)

BISECTIONS = 8  # ratios are found to 1/256

Fraction = Callable[[nn.Module], float]


@contextmanager
def open_target(checkpoint: Checkpoint, target: PruneTarget, ctx: Context) -> Iterator[Fraction]:
    """Yield a function of a smaller model: the fraction that remains of what the target names.

    Raises:
        InvalidInputError: The target is a latency, and no engine measures it here.
    """
    if target.params is not None:
        before = parameter_count(checkpoint.model)
        yield lambda model: parameter_count(model) / before
    elif target.macs is not None:
        macs = count(checkpoint.model, checkpoint.spec).macs
        yield lambda model: count(model, checkpoint.spec).macs / macs
    elif ctx.open_engine_costs is None:
        raise InvalidInputError("prune: target latency is measured in an engine, and none is open here; set macs")
    else:
        with ctx.open_engine_costs(checkpoint, target.engine or DEFAULT_ENGINE) as costs:
            yield lambda model: costs.relative_latency(checkpoint.evolve(model=model))


def reach_target(
    checkpoint: Checkpoint, target: PruneTarget, ctx: Context, prune_by: Callable[[float], Pruned]
) -> Pruned:
    """Return the model pruned by the smallest ratio that reaches the target; `prune_by` prunes by a ratio.

    Raises:
        InvalidInputError: No ratio reaches the target; the message names the smallest fraction that one reaches.
    """
    low, high, smallest, reached = 0.0, 1.0, 1.0, None
    parameters = parameter_count(checkpoint.model)
    with open_target(checkpoint, target, ctx) as remaining:
        for _ in range(BISECTIONS):
            ratio = (low + high) / 2
            try:
                model = prune_by(ratio).model
            except TooMuchRemovedError:
                high = ratio
                continue
            # a latency varies: that of a network that lost nothing is not below its own
            fraction = 1.0 if parameter_count(model) == parameters else remaining(model)
            del model  # memory holds one pruned model at a time
            smallest = min(smallest, fraction)
            if fraction > target.fraction:
                low = ratio
            else:
                high, reached = ratio, fraction
    if reached is None:
        raise unreachable(target, smallest)
    logger.info(f"prune: ratio {high:.3f} leaves {reached:.3f} of the {target.quantity}")
    ctx.notes.update({"ratio": high, f"{target.name}_fraction": round(reached, 4)})
    return prune_by(high)


def unreachable(target: PruneTarget, smallest: float) -> InvalidInputError:
    """Return the error for a target that cannot be reached; `smallest` is the fraction that can."""
    least = math.ceil(1000 * smallest) / 1000  # rounded up, so that it can be reached
    return InvalidInputError(
        f"prune: target {target.name} {target.fraction:g} cannot be reached: at least {least:.3f} of the "
        f"{target.quantity} remain; set target.{target.name} to {least:.3f} or more"
    )
