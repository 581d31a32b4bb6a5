"""Streaming statistics of a tensor: a histogram of its magnitudes with a fixed number of bins.

    bin k of K counts  k / K <= |x| / top < (k + 1) / K,     top the smallest power of two above every |x| so far

When a larger value arrives, top doubles and pairs of bins are summed. The bins of one range are exactly pairs of those
of half the range, so the counts depend neither on the batches nor on the order of the values. The statistics also hold
the largest magnitude and, per evaluation of the plan, the sum over samples of a sample's largest magnitude.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from diffpress.compress.quantization.calibration.observer import NonFiniteError
from diffpress.compress.quantization.formats import LEAST_MAGNITUDE

BINS = 4096


@dataclass(frozen=True)
class Statistics:
    """Statistics of T named tensors over the C evaluations that sampling one batch takes, updated in place.

    Attributes:
        names: Names of the tensors.
        largest: Largest magnitude, float64 [T].
        top: Upper end of the histogram, float64 [T].
        counts: Histogram, int64 [T, BINS].
        sums: Sum over samples of a sample's largest magnitude, float64 [T, C].
        rows: Number of samples in `sums`, int64 [T, C].
    """

    names: tuple[str, ...]
    largest: torch.Tensor
    top: torch.Tensor
    counts: torch.Tensor
    sums: torch.Tensor
    rows: torch.Tensor

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name, as saved in a file."""
        return {name: getattr(self, name) for name in ("largest", "top", "counts", "sums", "rows")}


def empty_statistics(names: Iterable[str], evaluations: int) -> Statistics:
    """Return empty statistics of `names` over `evaluations` per batch."""
    names = tuple(names)
    integer, real = torch.int64, torch.float64
    return Statistics(
        names,
        torch.zeros(len(names), dtype=real),
        torch.full((len(names),), LEAST_MAGNITUDE, dtype=real),
        torch.zeros(len(names), BINS, dtype=integer),
        torch.zeros(len(names), evaluations, dtype=real),
        torch.zeros(len(names), evaluations, dtype=integer),
    )


def update_statistics_(statistics: Statistics, index: int, x: torch.Tensor, evaluation: int, samples: int) -> None:
    """Add a tensor to the statistics.

    Args:
        statistics: Updated in place.
        index: Number of the tensor.
        x: [n * samples, ...], of any dtype; with another leading dimension it counts as one sample.
        evaluation: Index of the evaluation in its batch.
        samples: Number of samples in the evaluation.

    Raises:
        NonFiniteError: x holds a value that is not finite.
    """
    rows = samples if x.dim() and len(x) % samples == 0 else 1
    magnitudes = x.detach().abs().reshape(rows, -1)
    maxima = magnitudes.amax(1)
    largest = maxima.max().item()
    if not math.isfinite(largest):
        raise NonFiniteError
    statistics.largest[index].clamp_(min=largest)
    statistics.sums[index, evaluation] += maxima.sum(dtype=torch.float64).item()
    statistics.rows[index, evaluation] += rows
    top, counts = statistics.top[index], statistics.counts[index]
    while largest >= top:
        counts[: BINS // 2], counts[BINS // 2 :] = counts.view(-1, 2).sum(1), 0
        top *= 2
    bins = (magnitudes * (BINS / top.item())).flatten().int()  # counting int32 is exact and ten times faster than histc
    counts += torch.bincount(bins, minlength=BINS).cpu()
