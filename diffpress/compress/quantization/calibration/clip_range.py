"""Which magnitude is not clipped any more: an activation's amax, read from its statistics.

    max          the largest magnitude there was
    percentile   the magnitude below which that share of all values lies
    mse          the amax that minimises the sum over all values of (x - q(x))^2
    entropy      the amax that minimises KL(P || Q): P the counts up to amax, with all beyond it in the last bin; Q the
                 counts up to amax after as many equal parts as an integer has levels each averaged theirs (Migacz 2017)
    step_means   min over the plan's calls of the mean over samples of a sample's largest magnitude

Values are taken to lie evenly within a bin. Then the rounding error is an integral that has a closed form: for a format
whose levels, as shares of amax, are u_0 = 0 < ... < u_n = 1, with u(x) the nearest one,

    E(x) = int_0^x (v - u(v))^2 dv = P(u(x)) + (x - u(x))^3 / 3,    P(u_i) = sum_{j<i} (u_{j+1} - u_j)^3 / 12

is the error of values from 0 to x for an amax of 1, and amax^3 E(x / amax) for any other.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from diffpress.compress.quantization.calibration.statistics import BINS, Statistics
from diffpress.compress.quantization.formats import Number

Method = Literal["max", "percentile", "mse", "entropy", "step_means"]

# of mse: the ratio of one candidate to the next, and how many lie between the best one's neighbours the second time
COARSE, FINE = 1.05, 33

ENTROPY_STRIDE = 16  # in bins


def amax_of(statistics: Statistics, index: int, method: Method, number: Number, percentile: float) -> float:
    """The amax of tensor number `index` by `method`; 0 where it was never seen, or never was anything but 0."""
    largest = float(statistics.largest[index])
    if largest == 0.0 or method == "max":
        return largest
    if method == "step_means":
        rows = statistics.rows[index].numpy()
        return float((statistics.sums[index].numpy()[rows > 0] / rows[rows > 0]).min())
    counts, top = statistics.counts[index].numpy(), float(statistics.top[index])
    if method == "percentile":
        return min(percentile_amax(counts, top, percentile), largest)
    return min((mse_amax if method == "mse" else entropy_amax)(counts, top, number), largest)


def percentile_amax(counts: np.ndarray, top: float, percentile: float) -> float:
    """Counts int64 [BINS] of magnitudes from 0 to `top` -> the magnitude that `percentile` % do not exceed."""
    below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return float(np.interp(percentile / 100, below, _edges(top)))


def mse_amax(counts: np.ndarray, top: float, number: Number) -> float:
    """Counts as above -> the amax for which rounding to `number` costs least."""
    edges, levels = _edges(top), unit_levels(number)
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    edges, density = edges[: occupied + 1], counts[:occupied] / edges[1]
    candidates = edges[-1] * COARSE ** -np.arange(0.0, np.log(occupied) / np.log(COARSE))
    best = int(np.argmin(_errors(candidates, edges, density, levels)))
    low, high = candidates[min(best + 1, len(candidates) - 1)], candidates[max(best - 1, 0)]
    candidates = np.linspace(low, high, FINE)
    return float(candidates[np.argmin(_errors(candidates, edges, density, levels))])


def unit_levels(number: Number) -> np.ndarray:
    """The magnitudes that `number` can hold, ascending from 0, as shares of the largest."""
    if isinstance(number.bits, int):
        return np.arange(number.largest + 1) / number.largest
    exponents, mantissa = 2 ** number.bits[0], 2 ** number.bits[1]
    fractions = np.arange(mantissa) / mantissa
    normal = [(1 + fractions) * 2.0 ** (e - 1) for e in range(1, exponents)]
    values = np.concatenate([fractions, *normal]) * 2.0 ** (2 - exponents // 2)
    return values[values <= number.largest] / number.largest


def _errors(candidates: np.ndarray, edges: np.ndarray, density: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """The summed squared rounding error for every candidate amax (the formula at the top of this file)."""
    gaps = np.diff(levels)
    before = np.concatenate([[0.0], np.cumsum(gaps**3) / 12])
    x = edges / candidates[:, None]
    nearest = np.searchsorted(levels[:-1] + gaps / 2, x)
    error = before[nearest] + (x - levels[nearest]) ** 3 / 3
    result: np.ndarray = candidates**3 * (np.diff(error, axis=1) @ density)
    return result


def entropy_amax(counts: np.ndarray, top: float, number: Number) -> float:
    """Counts as above -> the amax of least divergence from `number`, an integer.

    The first bin counts as its neighbour: exact zeros cost nothing to represent, and would outweigh everything else.
    """
    counts = np.concatenate([counts[1:2], counts[1:]]).astype(np.float64)
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    levels = min(int(number.largest) + 1, occupied)
    candidates = [*range(levels, occupied, ENTROPY_STRIDE), occupied]
    divergences = [_divergence(counts[:stop], counts[stop:].sum(), levels) for stop in candidates]
    return float(_edges(top)[candidates[int(np.argmin(divergences))]])


def _divergence(counts: np.ndarray, beyond: float, levels: int) -> float:
    p = counts.copy()
    p[-1] += beyond
    if counts[-1] == 0 < beyond:
        return np.inf
    parts = np.arange(len(counts)) * levels // len(counts)
    totals, filled = (np.bincount(parts, weights=w, minlength=levels) for w in (counts, counts > 0))
    q = np.where(counts > 0, totals[parts] / np.maximum(filled, 1)[parts], 0.0)
    seen = p > 0
    p, q = p[seen] / p.sum(), q[seen] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _edges(top: float) -> np.ndarray:
    return np.linspace(0.0, top, BINS + 1)
