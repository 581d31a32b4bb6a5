"""How many channels of each group to keep, and which: the least important go first."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch

from diffpress.runtime.errors import InvalidInputError

MIN_KEPT = 0.25


@dataclass(frozen=True)
class Candidate:
    """A coupled group of channels: a score [C] for each channel, the number of normalisation groups its channels
    fall into, the unit that it shrinks by, what one channel costs, and how channels are removed, by their indices.
    """

    scores: torch.Tensor
    norm_groups: int
    unit: int
    cost: float
    remove: Callable[[list[int]], None]

    @property
    def channels(self) -> int:
        return len(self.scores)


def keep_count(channels: int, ratio: float, unit: int) -> int:
    """Channels to keep: (1 - ratio) of them, rounded to a multiple of `unit`; InvalidInputError where that is none."""
    wanted = round(channels * (1.0 - ratio) / unit) * unit
    if wanted == 0 and unit < channels:
        raise InvalidInputError(
            f"prune: ratio {ratio:g} leaves nothing of a layer with {channels} channels, which go in units of {unit}; "
            f"the most is {1 - unit / channels:.2f}"
        )
    return min(channels, max(unit, wanted))


def choose_removed(scores: torch.Tensor, keep: int, groups: int) -> list[int]:
    """Indices [C - keep] of the least important channels, equally many from each of `groups` runs of channels."""
    order = _least_first(scores, groups)
    return sorted(order[:, : order.shape[1] - keep // groups].flatten().tolist())


def _least_first(scores: torch.Tensor, groups: int) -> torch.Tensor:
    """Indices [groups, C / groups] of each of `groups` runs of channels, the least important first."""
    order = scores.reshape(groups, -1).argsort(dim=1, stable=True)
    return order + torch.arange(groups)[:, None] * order.shape[1]


def allocate(candidates: list[Candidate], ratio: float) -> list[int]:
    """Channels to keep of each candidate, so that `ratio` of all channels go where a cost unit hurts least.

    Units are removed one by one in the order of score lost per cost saved; a group keeps a quarter of itself.
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
            raise InvalidInputError(
                f"prune: ratio {ratio:g} leaves too little of some layer; at most {possible:.2f} can go"
            )
        _, best = heapq.heappop(offers)
        keeps[best] -= candidates[best].unit
        removed += candidates[best].unit
        for price in islice(prices[best], 1):
            heapq.heappush(offers, (price, best))
    return keeps


def _prices(candidate: Candidate) -> Iterator[float]:
    """Score lost per cost saved by each further unit, down to the quarter that stays."""
    scores, gone = candidate.scores, torch.zeros(candidate.channels, dtype=torch.bool)
    order, lost = _least_first(scores, candidate.norm_groups), torch.zeros(())
    for keep in range(candidate.channels - candidate.unit, -1, -candidate.unit):
        if keep < max(candidate.unit, candidate.channels * MIN_KEPT):
            return
        gone[order[:, : order.shape[1] - keep // candidate.norm_groups]] = True
        before, lost = lost, scores[gone].sum()
        yield float(lost - before) / (candidate.unit * candidate.cost)
