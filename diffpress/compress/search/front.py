"""Pareto fronts: which trials no other one beats in everything, and which of them is chosen.

One dominates another if it is no worse in every value and better in one; all values are minimized.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

Item = TypeVar("Item")
Values = Sequence[float]


def dominates(one: Values, other: Values) -> bool:
    """Return whether `one` is no worse than `other` in every value and better in at least one."""
    return all(a <= b for a, b in zip(one, other, strict=True)) and tuple(one) != tuple(other)


def front(items: Sequence[Item], values: Sequence[Values]) -> list[Item]:
    """Return the items whose values no other item dominates, in order; of equal ones the first."""
    return [
        item
        for i, item in enumerate(items)
        if not any(dominates(other, values[i]) for other in values)
        and not any(tuple(values[j]) == tuple(values[i]) for j in range(i))
    ]


def violation(excesses: Mapping[str, float]) -> float:
    """Return by how much bounds are exceeded, all together; 0 if they are kept."""
    return sum(max(excess, 0.0) for excess in excesses.values())


def constrained_front(
    items: Sequence[Item], values: Sequence[Values], excesses: Sequence[Mapping[str, float]]
) -> list[Item]:
    """Return the front of the items that keep the bounds; if none does, the item that comes nearest."""
    if not items:
        return []
    kept = [i for i, found in enumerate(excesses) if violation(found) == 0.0]
    if not kept:
        return [items[min(range(len(items)), key=lambda i: (violation(excesses[i]), i))]]
    return front([items[i] for i in kept], [values[i] for i in kept])


def is_promising(own: Values, others: Sequence[Values], excess: float, other_excesses: Sequence[float]) -> bool:
    """Return whether a trial deserves a larger budget: bounds first, then the front.

    A trial that exceeds bounds does if no other keeps them and none comes nearer.
    """
    if excess > 0.0:
        return all(excess < other for other in other_excesses)
    return not any(
        other_excess == 0.0 and dominates(other, own)
        for other, other_excess in zip(others, other_excesses, strict=True)
    )


def spread_out(items: Sequence[Item], key: Sequence[float], most: int) -> list[Item]:
    """Return at most `most` items, evenly chosen in the order of `key` (lowest and highest included)."""
    order = sorted(range(len(items)), key=lambda i: (key[i], i))
    if len(order) <= most:
        return [items[i] for i in order]
    if most == 1:
        return [items[order[0]]]
    return [items[order[round(n * (len(order) - 1) / (most - 1))]] for n in range(most)]
