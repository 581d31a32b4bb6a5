"""compress/evaluation/metrics.py: every distance is checked against a closed form, a naive loop or another library."""

from __future__ import annotations

import numpy as np
import pytest

from diffpress.compress.evaluation.metrics import (
    MAX_SQNR_DB,
    frechet_distance,
    kernel_distance,
    kernel_within,
    moments,
    psnr_db,
    sqnr_db,
    ssim,
)


def features(seed: int, count: int = 300, width: int = 6) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return (rng.standard_normal((count, width)) @ rng.standard_normal((width, width))).astype(np.float32)


def test_moments_are_mean_and_unbiased_covariance() -> None:
    x = features(0, 50)
    mean, covariance = moments(x)
    centred = x.astype(np.float64) - x.astype(np.float64).mean(0)
    np.testing.assert_allclose(mean, x.astype(np.float64).mean(0))
    np.testing.assert_allclose(covariance, centred.T @ centred / 49)


def test_the_frechet_distance_of_axis_aligned_gaussians_has_a_closed_form() -> None:
    mean_1, mean_2 = np.array([1.0, 2.0, 3.0]), np.array([0.0, 2.0, 5.0])
    deviation_1, deviation_2 = np.array([1.0, 2.0, 0.0]), np.array([3.0, 0.5, 1.0])
    found = frechet_distance(mean_1, np.diag(deviation_1**2), mean_2, np.diag(deviation_2**2))
    assert found == pytest.approx(1 + 4 + ((deviation_1 - deviation_2) ** 2).sum())


def test_the_frechet_distance_agrees_with_scipys_matrix_root() -> None:
    linalg = pytest.importorskip("scipy.linalg")
    (mean_1, cov_1), (mean_2, cov_2) = moments(features(1)), moments(features(2))
    cross = np.trace(linalg.sqrtm(cov_1 @ cov_2)).real
    expected = ((mean_1 - mean_2) ** 2).sum() + np.trace(cov_1) + np.trace(cov_2) - 2 * cross
    assert frechet_distance(mean_1, cov_1, mean_2, cov_2) == pytest.approx(expected, rel=1e-9)


def test_equal_gaussians_have_no_distance_even_if_degenerate() -> None:
    mean, covariance = moments(features(3, count=4))  # rank 3 of 6
    # the root of a zero eigenvalue is accurate to the root of the float64 precision, about 1e-8 of the largest
    assert abs(frechet_distance(mean, covariance, mean, covariance)) < 1e-7 * np.trace(covariance)


def test_the_kernel_distance_equals_a_naive_double_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = features(4, 7).astype(np.float64), features(5, 9).astype(np.float64)

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (a @ b / 6 + 1) ** 3

    expected = sum(k(a, b) for i, a in enumerate(x) for j, b in enumerate(x) if i != j) / (7 * 6)
    expected += sum(k(a, b) for i, a in enumerate(y) for j, b in enumerate(y) if i != j) / (9 * 8)
    expected -= 2 * sum(k(a, b) for a in x for b in y) / (7 * 9)
    assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)
    assert kernel_distance(x, y, kernel_within(y)) == kernel_distance(x, y)
    with monkeypatch.context() as patch:
        patch.setattr("diffpress.compress.evaluation.metrics.ROWS", 3)
        assert kernel_distance(x, y) == pytest.approx(expected, rel=1e-9)


def test_equal_distributions_have_a_kernel_distance_about_zero_of_either_sign() -> None:
    rng = np.random.default_rng(0)
    values = [kernel_distance(*rng.standard_normal((2, 50, 4))) for _ in range(400)]
    assert min(values) < 0 < max(values)
    assert abs(np.mean(values)) < 4 * np.std(values) / np.sqrt(400)  # unbiased
    shifted = rng.standard_normal((2, 100, 4)) + np.array([0.0, 1.5])[:, None, None]
    assert kernel_distance(*shifted) > 10 * np.std(values)


def test_psnr_is_the_mean_over_images() -> None:
    reference = np.zeros((2, 1, 2, 2), np.float32)
    other = reference + np.array([0.1, 0.2], np.float32).reshape(2, 1, 1, 1)
    expected = np.mean([10 * np.log10(4 / 0.01), 10 * np.log10(4 / 0.04)])  # range 2: 26.0 and 20.0 dB
    assert psnr_db(reference, other, 2.0) == pytest.approx(expected, abs=1e-5)
    assert np.isfinite(psnr_db(reference, reference, 2.0))


def test_sqnr_matches_its_definition_and_is_bounded_without_noise() -> None:
    x = np.array([3.0, -4.0], np.float32)
    assert sqnr_db(x, np.array([3.0, -3.5], np.float32)) == pytest.approx(20.0)  # 25 against 0.25
    assert sqnr_db(x, x) == MAX_SQNR_DB


def test_a_zero_reference_has_the_lowest_sqnr_and_no_warning() -> None:
    with np.errstate(all="raise"):
        assert sqnr_db(np.zeros(3, np.float32), np.ones(3, np.float32)) <= 0.0


def test_ssim_is_one_for_equal_images_and_falls_with_noise() -> None:
    rng = np.random.default_rng(0)
    images = rng.uniform(-1, 1, (3, 1, 16, 16)).astype(np.float32)
    noisy = [images + rng.standard_normal(images.shape).astype(np.float32) * s for s in (0.1, 0.5)]
    assert ssim(images, images, 2.0) == pytest.approx(1.0)
    assert 1.0 > ssim(images, noisy[0], 2.0) > ssim(images, noisy[1], 2.0) > 0.0
