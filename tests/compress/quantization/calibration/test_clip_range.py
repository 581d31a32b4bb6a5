"""compress/quantization/calibration/clip_range.py: compared with brute force over the values."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from diffpress.compress.quantization.calibration.clip_range import amax_of, entropy_amax, unit_levels
from diffpress.compress.quantization.calibration.statistics import (
    BINS,
    Statistics,
    empty_statistics,
    update_statistics_,
)
from diffpress.compress.quantization.config import Method
from diffpress.compress.quantization.formats import FP4, FP8, INT4, INT8, Number

DRAWS = {
    "normal": lambda g: torch.randn(8, 5000, generator=g),
    "silu": lambda g: torch.nn.functional.silu(3 * torch.randn(8, 5000, generator=g)),
    "heavy": lambda g: torch.randn(8, 5000, generator=g) ** 5,
    "outlier": lambda g: torch.cat([torch.randn(39_999, generator=g), torch.tensor([300.0])]).view(8, -1),
}


@pytest.fixture(params=list(DRAWS))
def values(request: pytest.FixtureRequest) -> torch.Tensor:
    return DRAWS[request.param](torch.Generator().manual_seed(0))


def statistics_of(x: torch.Tensor) -> Statistics:
    statistics = empty_statistics(["x"], 2)
    for evaluation, part in enumerate(x.split(4)):
        update_statistics_(statistics, 0, part, evaluation, len(part))
    return statistics


def error(x: torch.Tensor, amax: float, number: Number) -> float:
    """The mean squared error of rounding to `number`, with torch's dtype if it has one."""
    scaled = (x.double() / amax).clamp(-1, 1) * number.largest
    if number.is_integer:
        rounded = scaled.round()
    elif number is FP8:
        rounded = scaled.float().to(torch.float8_e4m3fn).double()
    else:
        levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64)
        rounded = levels[torch.bucketize(scaled.abs(), (levels[1:] + levels[:-1]) / 2)] * scaled.sign()
    return (rounded * amax / number.largest - x).square().mean().item()


@pytest.mark.parametrize("number", [INT8, INT4, FP8, FP4], ids=lambda number: number.name)
def test_mse_is_close_to_the_best_of_all_candidates(number: Number, values: torch.Tensor) -> None:
    found = amax_of(statistics_of(values), 0, "mse", number, 0.0)
    candidates = np.geomspace(values.abs().max().item() / 300, values.abs().max().item(), 100)
    best = min(error(values, float(candidate), number) for candidate in candidates)
    assert error(values, found, number) < 1.01 * best


def test_mse_finds_a_sharp_minimum_within_a_bin_width() -> None:
    # all values lie on the levels of amax 1, so any other amax has an error
    x = torch.arange(-127, 128).repeat(50).float().view(5, -1) / 127
    top = statistics_of(x).top.item()
    assert amax_of(statistics_of(x), 0, "mse", INT8, 0.0) == pytest.approx(1.0, abs=top / BINS)


@pytest.mark.parametrize("percentile", [90.0, 99.9, 100.0])
def test_percentile_matches_the_values_within_a_bin_width(percentile: float, values: torch.Tensor) -> None:
    statistics = statistics_of(values)
    found = amax_of(statistics, 0, "percentile", INT8, percentile)
    magnitudes = values.abs().flatten().double().numpy()
    low, high = (np.percentile(magnitudes, percentile, method=m) for m in ("lower", "higher"))
    width = statistics.top.item() / BINS
    assert low - width <= found <= high + width


def test_max_is_exactly_the_largest_magnitude(values: torch.Tensor) -> None:
    assert amax_of(statistics_of(values), 0, "max", INT8, 99.0) == values.abs().max().item()


def test_step_means_is_the_minimum_over_evaluations_of_the_mean_over_samples(values: torch.Tensor) -> None:
    expected = min(part.abs().amax(1).mean().item() for part in values.split(4))
    assert amax_of(statistics_of(values), 0, "step_means", INT8, 0.0) == pytest.approx(expected, rel=1e-6)


def test_evaluations_that_do_not_run_a_layer_do_not_count_in_its_step_means() -> None:
    statistics = empty_statistics(["x"], 3)
    update_statistics_(statistics, 0, torch.tensor([[2.0], [4.0]]), 1, 2)
    assert amax_of(statistics, 0, "step_means", INT8, 0.0) == 3.0


def published_entropy_bins(counts: list[float], number: Number) -> int:
    """How many bins are kept according to Migacz's slides (GTC 2017), in plain loops."""
    levels, best = int(number.largest) + 1, (np.inf, 0)
    last = max(i for i, count in enumerate(counts) if count) + 1
    for bins_kept in [*range(levels, last, 16), last]:
        reference = counts[:bins_kept]
        reference[-1] += sum(counts[bins_kept:])
        expanded = []
        for level in range(levels):
            bins = [counts[i] for i in range(bins_kept) if i * levels // bins_kept == level]
            filled = sum(1 for count in bins if count)
            expanded += [sum(bins) / filled if count else 0.0 for count in bins]
        p, q = np.array(reference) / sum(reference), np.array(expanded) / sum(expanded)
        with np.errstate(divide="ignore"):
            divergence = sum(a * np.log(a / b) for a, b in zip(p, q, strict=True) if a)
        best = min(best, (divergence, bins_kept))
    return best[1]


@pytest.mark.parametrize("number", [INT8, INT4], ids=lambda number: number.name)
def test_entropy_keeps_as_many_bins_as_the_published_loop(number: Number) -> None:
    x = torch.nn.functional.silu(3 * torch.randn(50_000, generator=torch.Generator().manual_seed(1)))
    counts = np.histogram(x.abs().numpy(), 512, (0, 16.0))[0]
    padded = np.zeros(BINS, dtype=np.int64)
    padded[:512] = counts  # the published loop is slow, so it gets only the filled bins
    counts[0] = counts[1]
    expected = published_entropy_bins([float(count) for count in counts], number)
    assert entropy_amax(padded, float(BINS), number) == expected < 512


@pytest.mark.parametrize("method", ["max", "percentile", "mse", "entropy", "step_means"])
def test_a_tensor_that_is_always_zero_has_amax_zero(method: Method) -> None:
    statistics = statistics_of(torch.zeros(8, 10))
    assert amax_of(statistics, 0, method, INT8, 99.0) == 0.0


def test_float_levels_match_the_dtype() -> None:
    codes = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # code 127 is NaN
    assert unit_levels(FP8).tolist() == (codes.double() / 448).tolist()
    assert (unit_levels(FP4) * 6).tolist() == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert (unit_levels(INT4) * 7).tolist() == list(range(8))
