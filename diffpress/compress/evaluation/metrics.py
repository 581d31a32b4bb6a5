"""Distances between sets of images and between pairs of images, in numpy.

    Frechet   |mu_1 - mu_2|^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^(1/2))            Heusel et al. 2017, eq. 6
    KID       unbiased MMD^2 with the kernel (x.y / d + 1)^3                 Binkowski et al. 2018, eq. 4
    PSNR      10 log10(range^2 / MSE), in dB;  SSIM from torchmetrics
    SQNR      10 log10(sum x^2 / sum (x - y)^2), in dB

The Frechet distance is FID only with InceptionV3 features; here the features are those of the named feature network.
"""

from __future__ import annotations

import numpy as np

MAX_SQNR_DB = 200.0  # float32 precision is about 140 dB
ROWS = 1024  # rows of the kernel matrix computed together


def moments(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return mean [D] and covariance [D, D] (ddof 1) of features [N, D], float64."""
    features = features.astype(np.float64)
    return features.mean(0), np.cov(features, rowvar=False)


def frechet_distance(mean_1: np.ndarray, cov_1: np.ndarray, mean_2: np.ndarray, cov_2: np.ndarray) -> float:
    """Return the Frechet distance of two Gaussians with means [D] and covariances [D, D]."""
    # tr (C1 C2)^(1/2) via the symmetric root of C1: only symmetric eigenproblems, no complex values
    values, vectors = np.linalg.eigh(cov_1)
    root = (vectors * np.sqrt(values.clip(0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ cov_2 @ root).clip(0)).sum()
    return float(((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2.0 * cross)


def kernel_distance(x: np.ndarray, y: np.ndarray, within_y: float | None = None) -> float:
    """Return the unbiased KID between features x [N, D] and y [M, D]; about zero for equal distributions.

    `within_y` is a precomputed `kernel_within(y)`, which saves most of the work if y is a large reference.
    """
    within_y = kernel_within(y) if within_y is None else within_y
    return kernel_within(x) + within_y - 2.0 * _kernel_sum(x, y) / (len(x) * len(y))


def kernel_within(x: np.ndarray) -> float:
    """Return the mean of the kernel over all pairs of different rows of x [N, D]."""
    own = ((x.astype(np.float64) ** 2).sum(1) / x.shape[1] + 1.0) ** 3
    return (_kernel_sum(x, x) - float(own.sum())) / (len(x) * (len(x) - 1))


def _kernel_sum(x: np.ndarray, y: np.ndarray) -> float:
    """Sum the kernel over all pairs of rows, ROWS rows at a time; k * k * k is much faster than k**3."""
    x, y, total = x.astype(np.float64), y.astype(np.float64), 0.0
    for start in range(0, len(x), ROWS):
        kernel = x[start : start + ROWS] @ y.T / x.shape[1] + 1.0
        total += float((kernel * kernel * kernel).sum())
    return total


def sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the SQNR in dB, clipped to +-HIGHEST_DB: for equal arrays it is infinite, which JSON cannot represent."""
    signal, noise = (float((x.astype(np.float64) ** 2).sum()) for x in (reference, reference - other))
    if noise == 0.0:
        return MAX_SQNR_DB
    return float(np.clip(10.0 * np.log10(max(signal, 1e-300) / noise), -MAX_SQNR_DB, MAX_SQNR_DB))


def mean_sqnr_db(reference: np.ndarray, other: np.ndarray) -> float:
    """Return the mean SQNR over samples [N, ...], so that a single outlier does not dominate."""
    return float(np.mean([sqnr_db(ours, theirs) for ours, theirs in zip(reference, other, strict=True)]))


def psnr_db(reference: np.ndarray, other: np.ndarray, data_range: float) -> float:
    """Return the mean PSNR in dB over images [N, C, H, W]."""
    error = ((reference.astype(np.float64) - other) ** 2).mean((1, 2, 3)).clip(1e-12)
    return float((10.0 * np.log10(data_range**2 / error)).mean())


def ssim(reference: np.ndarray, other: np.ndarray, data_range: float) -> float:
    """Return the mean SSIM over images [N, C, H, W]."""
    import torch
    from torchmetrics.functional.image import structural_similarity_index_measure

    sigma = max(0.1, min(1.5, (min(reference.shape[2:]) - 1) / 3.5))  # the window must be smaller than the image
    value = structural_similarity_index_measure(
        torch.from_numpy(other), torch.from_numpy(reference), data_range=data_range, sigma=sigma
    )
    return float(value)  # type: ignore[arg-type]
