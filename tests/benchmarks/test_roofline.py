"""benchmarks/roofline.py: the bound of a subject, and peaks that are those of real products."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from roofline import bound_ms
from subjects import SUBJECTS

ROOFLINE: dict[str, Any] = {
    "peak_gmacs": {"fp32": 10.0, "bf16": 20.0, "int8": 40.0},
    "layer_gmacs": 80.0,
    "attention_gmacs": 20.0,
}


@pytest.mark.parametrize(
    ("subject", "ms"),
    [
        ("openvino-fp32", 10_000.0),
        ("openvino-bf16", 5_000.0),
        ("openvino-int8", 3_250.0),
        ("nncf-bf16", 2_750.0),
        ("torch-fp32", None),
    ],
)
def test_layers_and_attention_are_bound_by_the_peaks_of_their_types(subject: str, ms: float | None) -> None:
    assert subject in SUBJECTS and bound_ms(ROOFLINE, subject) == ms
    assert bound_ms({"failed": "out of memory (killed)"}, subject) is None


def test_the_timed_products_compute_what_they_are_counted_as(monkeypatch: pytest.MonkeyPatch) -> None:
    openvino = pytest.importorskip("openvino")
    import roofline

    from diffpress.runtime.engines.openvino.layers import products

    for name, value in {"SIDE": 8, "CHANNELS": 16, "ROWS": 32, "DEPTH": 64}.items():
        monkeypatch.setattr(roofline, name, value)
    x = np.random.default_rng(0).integers(0, 100, (32, 64)).astype(np.float32) / 100
    weight = np.random.default_rng(0).integers(-64, 65, (64, 32)) * 0.01
    for kind in ("fp32", "int8"):
        product, convolution = roofline._product(kind), roofline._convolution(kind)
        compiled = openvino.Core().compile_model(product, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        np.testing.assert_allclose(compiled(x)[0], np.maximum(x @ weight, 0.0), atol=1e-3)
        assert sum(found.macs for found in products(product, compiled)) == 32 * 32 * 64
        compiled = openvino.Core().compile_model(convolution, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        assert sum(found.macs for found in products(convolution, compiled)) == 8 * 8 * 16 * 16 * 9
        assert roofline.peak(kind) > 0.0
