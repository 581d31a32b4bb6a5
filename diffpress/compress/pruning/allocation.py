"""Choose how many channels of each group to keep, and which to remove: the least important."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from diffpress.runtime.errors import InvalidInputError

MIN_KEPT = 0.25


class TooMuchRemovedError(InvalidInputError):
    """A ratio that leaves nothing of a layer, or less than `MIN_KEPT` of all."""


@dataclass(frozen=True)
class Candidate:
    """A prunable coupled group.

    Attributes:
        scores: Importance of each channel, [C].
        norm_groups: Number of normalization groups that the channels fall into.
        unit: Channels are removed in multiples of this.
        cost: Cost of one channel (share of all weights plus share of all MACs).
        remove: Removes the channels with the given indices from the model.
    """

    scores: torch.Tensor
    norm_groups: int
    unit: int
    cost: float
    remove: Callable[[list[int]], None]

    @property
    def channels(self) -> int:
        """Number of channels C."""
        return len(self.scores)


def keep_count(channels: int, ratio: float, unit: int) -> int:
    """Return the number of channels to keep: (1 - ratio) of them, rounded to a multiple of `unit`.

    Raises:
        TooMuchRemovedError: The result is zero.
    """
    keep = round(channels * (1.0 - ratio) / unit) * unit
    if keep == 0 and unit < channels:
        raise TooMuchRemovedError(
            f"prune: ratio {ratio:g} leaves nothing of a layer with {channels} channels, removed in units of {unit}; "
            f"at most {1 - unit / channels:.2f} can be removed"
        )
    return min(channels, max(unit, keep))


def choose_removed(scores: torch.Tensor, keep: int, groups: int) -> list[int]:
    """Return the sorted indices [C - keep] of the least important channels, equally many from each of `groups` runs."""
    order = _least_first(scores, groups)
    return sorted(order[:, : order.shape[1] - keep // groups].flatten().tolist())


def _least_first(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Return the indices [groups, C / groups] of each of `groups` runs of channels, least important first."""
    order = scores.reshape(groups, -1).argsort(dim=1, stable=True)
    return order + torch.arange(groups)[:, None] * order.shape[1]


def allocate(candidates: list[Candidate], ratio: float) -> list[int]:
    """Return the number of channels to keep per candidate, removing `ratio` of all channels globally.

    Units are removed greedily in order of score lost per cost saved; each group keeps at least `MIN_KEPT` of its
    channels.

    Raises:
        TooMuchRemovedError: The ratio cannot be reached.
    """
    channels = sum(candidate.channels for candidate in candidates)
    keeps = [candidate.channels for candidate in candidates]
    prices = [_prices(candidate) for candidate in candidates]
    offers = [(price, i) for i, further in enumerate(prices) for price in islice(further, 1)]
    heapq.heapify(offers)
    removed = 0
    while removed < ratio * channels:
        if not offers:
            possible = removed / max(channels, 1)
            raise TooMuchRemovedError(
                f"prune: ratio {ratio:g} leaves too little of some layer; at most {possible:.2f} can be removed"
            )
        _, best = heapq.heappop(offers)
        keeps[best] -= candidates[best].unit
        removed += candidates[best].unit
        for price in islice(prices[best], 1):
            heapq.heappush(offers, (price, best))
    return keeps


def _prices(candidate: Candidate) -> Iterator[float]:
    """Yield the score lost per cost saved by each further unit, until only `MIN_KEPT` remains."""
    scores, gone = candidate.scores, torch.zeros(candidate.channels, dtype=torch.bool)
    order, lost = _least_first(scores, candidate.norm_groups), torch.zeros(())
    for keep in range(candidate.channels - candidate.unit, -1, -candidate.unit):
        if keep < max(candidate.unit, candidate.channels * MIN_KEPT):
            return
        gone[order[:, : order.shape[1] - keep // candidate.norm_groups]] = True
        before, lost = lost, scores[gone].sum()
        yield float(lost - before) / (candidate.unit * candidate.cost)
