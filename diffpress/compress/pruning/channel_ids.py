"""Identity of channels: which entries of which tensors are the same channel of a network.

Every index along every dimension of a weight gets an id. Operations couple ids: a convolution couples the channels of
its input with the columns of its weight, an addition the channels of its two operands. Coupled ids are one channel, and
are removed together or not at all (union-find).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch

HARD = -1  # an index that belongs to no weight: the network's input, a position, a constant
FREE = -2  # an index that follows the size of what it meets: a broadcast

Ids = np.ndarray


@dataclass(frozen=True)
class Labels:
    """What is known of a tensor.

    Attributes:
        axes: Dimension -> channel ids [size]. The size of a dimension that is not listed cannot change.
        data: Whether the tensor depends on the network's inputs.
        weights: Names of the weights it was computed from.
        statistics: Ids over which it was reduced, as for the mean and variance of a normalization.
    """

    axes: dict[int, Ids] = field(default_factory=dict)
    data: bool = False
    weights: frozenset[str] = frozenset()
    statistics: tuple[Ids, ...] = ()


class ChannelIds:
    """Union-find over channel ids; a set of coupled ids may be fixed, with the reason."""

    def __init__(self, count: int = 0) -> None:
        self._parent = list(range(count))
        self._reasons: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, count: int) -> Ids:
        """Return `count` new ids."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def root(self, index: int) -> int:
        """Return the id that stands for all ids coupled with `index`."""
        path = index
        while self._parent[path] != path:
            path = self._parent[path]
        while self._parent[index] != path:
            self._parent[index], index = path, self._parent[index]
        return path

    def roots(self, ids: Ids) -> Ids:
        """Return the root of every id; HARD and FREE stay."""
        return np.array([self.root(i) if i >= 0 else i for i in ids.tolist()], dtype=np.int64)

    def fix(self, ids: Ids | None, reason: str) -> None:
        """Exclude the channels `ids` from pruning; the first reason is kept."""
        for i in [] if ids is None else ids.tolist():
            if i >= 0:
                self._reasons.setdefault(self.root(i), reason)

    def reason(self, index: int) -> str | None:
        """Return why a channel cannot be removed; None if it can."""
        return self._reasons.get(self.root(index))

    def couple(self, one: Ids | None, two: Ids | None, reason: str) -> Ids | None:
        """Couple ids element by element and return them; None means HARD everywhere.

        A channel that meets a HARD index is fixed for `reason`.
        """
        if one is None and two is None:
            return None
        size = len(one if one is not None else two)  # type: ignore[arg-type]
        first, second = (np.full(size, HARD) if ids is None else ids for ids in (one, two))
        if not np.array_equal(first, second):
            for a, b in zip(first.tolist(), second.tolist(), strict=True):
                if a >= 0 and b >= 0:
                    self._union(a, b)
                elif HARD in (a, b):
                    self.fix(np.array([max(a, b)]), reason)
        return np.where(first >= 0, first, np.maximum(first, second))

    def couple_all(self, rows: Sequence[Ids], reason: str) -> Ids | None:
        """Couple several rows of ids element by element and return them."""
        merged: Ids | None = rows[0]
        for row in rows[1:]:
            merged = self.couple(merged, row, reason)
        return merged

    def _union(self, a: int, b: int) -> None:
        a, b = sorted((self.root(a), self.root(b)))
        if a != b:
            self._parent[b] = a
            reason = self._reasons.pop(b, None)
            if reason is not None:
                self._reasons.setdefault(a, reason)


Arguments = Mapping[str, Any]


class Trace(Protocol):
    """What the rules read and write."""

    ids: ChannelIds

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor."""
        ...

    def equal_share(self, ids: Ids | None, groups: int, reason: str) -> None:
        """Require that equally many of `ids` are removed from each of `groups` runs."""
        ...

    def evaluates(self, weights: Iterable[str], positions: int) -> None:
        """Count the positions of the whole batch at which weights are multiplied."""
        ...


# (trace, name of the operation, its arguments by name, its outputs) -> axes of each output
Rule = Callable[[Trace, str, Arguments, list[torch.Tensor]], list[dict[int, Ids]]]


def tensors_in(values: Iterable[Any]) -> list[torch.Tensor]:
    """Return all tensors among `values`, in lists as well."""
    found: list[torch.Tensor] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            found.append(value)
        elif isinstance(value, (list, tuple)):
            found += tensors_in(value)
    return found
