"""benchmarks/serving.py: the slope that it prints, and the bodies that it sends."""

from __future__ import annotations

import numpy as np
import pytest


def test_the_slope_is_that_of_a_line_per_thousand_requests() -> None:
    import serving

    requests = np.arange(0.0, 10_000.0, 500.0)
    assert serving.slope_text(requests, 80.0 + requests * 2e-4) == "+0.200 ± 0.000"
    noise = np.where(np.arange(len(requests)) % 2, 1.0, -1.0)
    slope, error = map(float, serving.slope_text(requests, noise).split(" ± "))
    assert abs(slope) < 2 * error


@pytest.mark.parametrize(("kind", "names"), [("text", {"seed", "prompt"}), ("class", {"seed"}), ("none", {"seed"})])
def test_a_body_fits_the_kind_of_model(kind: str, names: set[str]) -> None:
    import serving

    assert set(serving.body_of(kind, 5)) == names
