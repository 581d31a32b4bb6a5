"""benchmarks/roofline.py: the bound of a subject."""

from __future__ import annotations

from typing import Any

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


def test_a_subject_whose_type_this_machine_does_not_execute_has_no_bound() -> None:
    without = ROOFLINE | {"peak_gmacs": {"fp32": 10.0, "int8": 40.0}}
    assert bound_ms(without, "openvino-int8-bf16") is None
    assert bound_ms(without, "openvino-int8") == 3_250.0
