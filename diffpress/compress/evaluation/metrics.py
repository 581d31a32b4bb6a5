"""Distances between sets of images and between pairs, in plain numpy.

    Frechet   |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))            Heusel et al. 2017, eq. 6
    KID       unbiased MMD^2 with the kernel (x.y / d + 1)^3                 Binkowski et al. 2018, eq. 4
    PSNR      10 log10(range^2 / MSE), in dB;  SSIM as torchmetrics has it
    SQNR      10 log10(sum x^2 / sum (x - y)^2), in dB

A Frechet distance is called FID only in InceptionV3's features; ours are the named feature network's.
"""

from __future__ import annotations

import numpy as np

HIGHEST_DB = 200.0  # float32 itself ends near 140
ROWS = 1024  # of a kernel matrix at a time


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean [D] and covariance [D, D] (ddof 1) of features [N, D], float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    # tr (C1 C2)^(1/2) through the symmetric root of C1: only symmetric eigenproblems, no complex parts.
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross)


def kernel_distance(x: np.ndarray, y: np.ndarray, within_y: float | None = None) -> float:
    """Unbiased KID of features x [N, D] against y [M, D]; about zero, of either sign, for equal distributions.

    `within_y` is `kernel_within(y)` where it is known already: most of the work where y is a large reference.
    """
    within_y = kernel_within(y) if within_y is None else within_y
    return kernel_within(x) + within_y - 2.0 * _kernel_sum(x, y) / (len(x) * len(y))


def kernel_within(x: np.ndarray) -> float:
    """Mean of the kernel over all pairs of different rows of x [N, D]."""
    own = ((x.astype(np.float64) ** 2).sum(1) / x.shape[1] + 1.0) ** 3
    return (_kernel_sum(x, x) - float(own.sum())) / (len(x) * (len(x) - 1))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Over all pairs of rows, a strip of the matrix at a time; a product of three is far faster than a power."""
    x, y, total = x.astype(np.float64), y.astype(np.float64), 0.0
    for start in range(0, len(x), ROWS):
        kernel = x[start : start + ROWS] @ y.T / x.shape[1] + 1.0
        total += float((kernel * kernel * kernel).sum())
    return total


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """At most HIGHEST_DB: equal arrays would have an infinite one, which JSON cannot say."""
    signal, noise = (float((x.astype(np.float64) ** 2).sum()) for x in (reference, reference - other))
    if noise == 0.0:
        return HIGHEST_DB
    return float(np.clip(10.0 * np.log10(max(signal, 1e-300) / noise), -HIGHEST_DB, HIGHEST_DB))


def mean_sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Mean over samples [N, ...] of each one's SQNR: one sample that went astray does not decide it alone."""
    return float(np.mean([sqnr_db(ours, theirs) for ours, theirs in zip(reference, other, strict=True)]))


def psnr_db(reference: np.ndarray, other: np.ndarray, data_range: float) -> float:
    """Mean over images [N, C, H, W] of each image's PSNR."""
    error = ((reference.astype(np.float64) - other) ** 2).mean((1, 2, 3)).clip(1e-12)
    return float((10.0 * np.log10(data_range**2 / error)).mean())


def ssim(reference: np.ndarray, other: np.ndarray, data_range: float) -> float:
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    value = structural_similarity_index_measure(
        torch.from_numpy(other), torch.from_numpy(reference), data_range=data_range
    )
    return float(value)  # type: ignore[arg-type]
