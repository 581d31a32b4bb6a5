"""Clip range of an activation: its amax, the largest magnitude not clipped, from its statistics.

    max          the largest magnitude observed
    percentile   the magnitude below which that percentage of all values lies
    mse          the amax that minimizes the sum over all values of (x - q(x))^2
    entropy      the amax that minimizes KL(P || Q): P is the counts up to amax, with all values beyond it in the last
                 bin; Q is the counts up to amax, averaged within as many equal ranges as the integer has levels
                 (Migacz 2017)
    step_means   min over the plan's evaluations of the mean over samples of a sample's largest magnitude

Values are assumed uniform within a bin. The rounding error is then an integral with a closed form: for a format with
levels u_0 = 0 < ... < u_n = 1, as fractions of amax, and u(x) the nearest level,

    E(x) = int_0^x (v - u(v))^2 dv = P(u(x)) + (x - u(x))^3 / 3,    P(u_i) = sum_{j<i} (u_{j+1} - u_j)^3 / 12

is the error of values from 0 to x for an amax of 1, and amax^3 E(x / amax) for any other amax.
"""

from __future__ import annotations

import numpy as np

from diffpress.compress.quantization.calibration.statistics import BINS, Statistics
from diffpress.compress.quantization.config import Method
from diffpress.compress.quantization.formats import Number

# mse search: ratio between successive candidates, and number of candidates in the second search around the best one
COARSE, FINE = 1.05, 33

ENTROPY_STRIDE = 16  # in bins


def amax_of(statistics: Statistics, index: int, method: Method, number: Number, percentile: float) -> float:
    """Return the amax of tensor number `index` by `method`; 0 if it was never observed or always 0."""
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
    """Return the magnitude that `percentile` % of the values do not exceed.

    `counts` int64 [BINS] is the histogram of magnitudes from 0 to `top`.
    """
    below = np.concatenate([[0], np.cumsum(counts)]) / counts.sum()
    return float(np.interp(percentile / 100, below, _edges(top)))


def mse_amax(counts: np.ndarray, top: float, number: Number) -> float:
    """Return the amax with the smallest squared error of rounding to `number`; `counts` as in percentile_amax."""
    edges, levels = _edges(top), unit_levels(number)
    occupied = int(np.flatnonzero(counts)[-1]) + 1
    edges, density = edges[: occupied + 1], counts[:occupied] / edges[1]
    candidates = edges[-1] * COARSE ** -np.arange(0.0, np.log(occupied) / np.log(COARSE))
    best = int(np.argmin(_errors(candidates, edges, density, levels)))
    low, high = candidates[min(best + 1, len(candidates) - 1)], candidates[max(best - 1, 0)]
    candidates = np.linspace(low, high, FINE)
    return float(candidates[np.argmin(_errors(candidates, edges, density, levels))])


def unit_levels(number: Number) -> np.ndarray:
    """Return the magnitudes that `number` can represent, ascending from 0, as fractions of the largest."""
    if isinstance(number.bits, int):
        return np.arange(number.largest + 1) / number.largest
    exponents, mantissa = 2 ** number.bits[0], 2 ** number.bits[1]
    fractions = np.arange(mantissa) / mantissa
    normal = [(1 + fractions) * 2.0 ** (e - 1) for e in range(1, exponents)]
    values = np.concatenate([fractions, *normal]) * 2.0 ** (2 - exponents // 2)
    return values[values <= number.largest] / number.largest


def _errors(candidates: np.ndarray, edges: np.ndarray, density: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Return the summed squared rounding error of every candidate amax (the formula in the module docstring)."""
    gaps = np.diff(levels)
    before = np.concatenate([[0.0], np.cumsum(gaps**3) / 12])
    x = edges / candidates[:, None]
    nearest = np.searchsorted(levels[:-1] + gaps / 2, x)
    error = before[nearest] + (x - levels[nearest]) ** 3 / 3
    result: np.ndarray = candidates**3 * (np.diff(error, axis=1) @ density)
    return result


def entropy_amax(counts: np.ndarray, top: float, number: Number) -> float:
    """Return the amax with the smallest KL divergence for the integer type `number`; `counts` as in percentile_amax.

    The first bin is replaced by its neighbor: exact zeros are represented exactly, and would dominate.
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
    level = np.arange(len(counts)) * levels // len(counts)
    totals, filled = (np.bincount(level, weights=w, minlength=levels) for w in (counts, counts > 0))
    q = np.where(counts > 0, totals[level] / np.maximum(filled, 1)[level], 0.0)
    seen = p > 0
    p, q = p[seen] / p.sum(), q[seen] / q.sum()
    return float(np.sum(p * np.log(p / q)))


def _edges(top: float) -> np.ndarray:
    return np.linspace(0.0, top, BINS + 1)
