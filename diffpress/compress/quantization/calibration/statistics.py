"""What calibration remembers of a tensor: counts of its magnitudes, streamed, in a fixed number of bins.

    bin k of K counts  k / K <= |x| / top < (k + 1) / K,     top the smallest power of two above every |x| so far

When a larger value comes, top doubles and bins are added up in pairs: the bins of one range are exactly pairs of those
of half the range, so the counts depend neither on how the values were split into batches nor on their order. Beside
them stand the largest magnitude, and for each call of the plan the sum over samples of a sample's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from diffpress.compress.quantization.calibration.observer import NonFiniteError

BINS = 4096
LEAST_TOP = 2.0**-100  # what is smaller counts as zero


@dataclass(frozen=True)
class Statistics:
    """Statistics of T named tensors over the C calls that sampling one batch takes, changed in place.

    largest float64 [T], top float64 [T], counts int64 [T, BINS], sums float64 [T, C] and rows int64 [T, C]
    (a sample's largest magnitude summed over samples, and how many samples there were).
    """

    names: tuple[str, ...]
    largest: torch.Tensor
    top: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    rows: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name, as a file stores them."""
        return {name: getattr(self, name) for name in ("largest", "top", "counts", "sums", "rows")}


def no_statistics(names: Iterable[str], calls: int) -> Statistics:
    """Nothing seen yet."""
    names = tuple(names)
    whole, real = torch.int64, torch.float64
    return Statistics(
        names,
        torch.zeros(len(names), dtype=real),
        torch.full((len(names),), LEAST_TOP, dtype=real),
        torch.zeros(len(names), BINS, dtype=whole),
        torch.zeros(len(names), calls, dtype=real),
        torch.zeros(len(names), calls, dtype=whole),
    )


def observe_(statistics: Statistics, index: int, x: torch.Tensor, call: int, samples: int) -> None:
    """Add tensor number `index` of call number `call`, made for `samples` samples: x [n * samples, ...], of any type.

    A tensor that is not laid out by samples counts as one. Raises NonFiniteError where x is not finite.
    """
    rows = samples if x.dim() and len(x) % samples == 0 else 1
    magnitudes = x.detach().abs().reshape(rows, -1)
    maxima = magnitudes.amax(1)
    largest = maxima.max().item()
    if not math.isfinite(largest):
        raise NonFiniteError
    statistics.largest[index].clamp_(min=largest)
    statistics.sums[index, call] += maxima.sum(dtype=torch.float64).item()
    statistics.rows[index, call] += rows
    top, counts = statistics.top[index], statistics.counts[index]
    while largest >= top:
        counts[: BINS // 2], counts[BINS // 2 :] = counts.view(-1, 2).sum(1), 0
        top *= 2
    bins = (magnitudes * (BINS / top.item())).flatten().int()  # int32 counts ten times faster than histc, and exactly
    counts += torch.bincount(bins, minlength=BINS).cpu()
