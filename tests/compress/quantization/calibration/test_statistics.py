"""compress/quantization/calibration/statistics.py: streaming gives the same counts as a histogram of all values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpress.compress.quantization.calibration.observer import NonFiniteError
from diffpress.compress.quantization.calibration.statistics import (
    BINS,
    Statistics,
    empty_statistics,
    update_statistics_,
)


def samples(seed: int = 0) -> torch.Tensor:
    """Samples whose magnitudes grow a thousandfold from the first to the last."""
    noise = torch.randn(12, 3, 40, generator=torch.Generator().manual_seed(seed))
    return noise * torch.logspace(-2, 1, 12).view(-1, 1, 1)


def streamed(x: torch.Tensor, sizes: list[int]) -> Statistics:
    statistics = empty_statistics(["other", "x"], 1)
    for part in x.split(sizes):
        update_statistics_(statistics, 1, part, 0, len(part))
    return statistics


@pytest.mark.parametrize("sizes", [[12], [1] * 12, [5, 7]])
@pytest.mark.parametrize("reverse", [False, True])
def test_counts_match_a_histogram_of_all_values(sizes: list[int], reverse: bool) -> None:
    x = samples().flip(0) if reverse else samples()
    found = streamed(x, sizes)
    magnitudes = x.abs().double().numpy()
    top = 2.0 ** np.floor(np.log2(magnitudes.max()) + 1)
    assert found.top[1] == top and found.largest[1] == magnitudes.max()
    assert found.counts[1].tolist() == np.histogram(magnitudes, BINS, (0, top))[0].tolist()
    assert found.sums[1, 0].item() == pytest.approx(magnitudes.max((1, 2)).sum()) and found.rows[1, 0] == 12
    assert found.counts[0].sum() == found.largest[0] == found.rows[0, 0] == 0


def test_evaluations_are_separate_and_tokens_count_with_their_sample() -> None:
    statistics = empty_statistics(["x"], 3)
    update_statistics_(statistics, 0, torch.tensor([[1.0], [-2.0], [3.0], [0.5]]), 0, 2)  # two rows per sample
    update_statistics_(statistics, 0, torch.tensor([[4.0], [6.0]]), 2, 2)
    update_statistics_(statistics, 0, torch.tensor([[7.0], [1.0], [1.0]]), 2, 2)  # three rows for two samples
    assert statistics.sums.tolist() == [[2.0 + 3.0, 0.0, 4.0 + 6.0 + 7.0]]
    assert statistics.rows.tolist() == [[2, 0, 3]]


def test_zeros_are_counted_before_and_after_other_values() -> None:
    statistics = empty_statistics(["x"], 1)
    for value in (0.0, 1.0, 0.0):
        update_statistics_(statistics, 0, torch.full((1, 5), value), 0, 1)
    assert statistics.counts[0, 0] == 10 and statistics.counts[0].sum() == 15 and statistics.top[0] == 2.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(NonFiniteError):
        update_statistics_(empty_statistics(["x"], 1), 0, torch.tensor([[1.0, value]]), 0, 1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_the_same_counts_as_float32(dtype: torch.dtype) -> None:
    x = samples().to(dtype)
    assert torch.equal(streamed(x, [12]).counts, streamed(x.float(), [12]).counts)


def test_memory_does_not_grow_with_the_number_of_values() -> None:
    few, many = streamed(samples()[:1], [1]), streamed(samples(), [1] * 12)
    assert [t.shape for t in few.tensors.values()] == [t.shape for t in many.tensors.values()]
