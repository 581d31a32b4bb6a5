"""runtime/benchmarking/advice.py: findings carry the figures of the profile that they follow from."""

from __future__ import annotations

from typing import Any

import pytest

from diffpress.runtime.benchmarking.advice import MOST, findings
from diffpress.runtime.benchmarking.peaks import Peaks
from diffpress.runtime.benchmarking.profiling import Times, profile_of
from diffpress.runtime.engines.executed_layers import (
    ATTENTION,
    CONVERSION,
    CONVOLUTION,
    ELEMENTWISE,
    LINEAR,
    NORMALIZATION,
    ExecutedLayer,
)

PEAKS = Peaks({"fp32": 100.0, "int8": 400.0}, {1.0: 10.0})


def layer(name: str, operation: str, precision: str, macs: int, size: int = 1000) -> ExecutedLayer:
    return ExecutedLayer(name, operation, operation, precision, macs, size)


def profile(*layers: tuple[ExecutedLayer, float], gap: float = 0.0, noise: float = 0.0) -> dict[str, Any]:
    total = sum(ms for _, ms in layers) + gap
    return profile_of(Times(total, total, layers, noise, 0.0), PEAKS)


FAST = (layer("fast", CONVOLUTION, "int8", 4 * 10**8), 1.0)  # at its peak


def test_a_profile_at_its_peaks_has_nothing_worth_doing() -> None:
    assert findings(profile(FAST)) == []


def test_conversions_could_save_all_but_the_time_of_their_bytes() -> None:
    (found,) = findings(profile(FAST, (layer("turn", CONVERSION, "fp32", 0, 10**6), 1.0)))
    assert found.saves_ms == pytest.approx(0.9)  # 1 MB at 10 GB/s take 0.1 ms
    assert "reorders and conversions take 50% of the step: 1.00 ms in 1 kernel" in found.text
    assert "10% of the measured bandwidth" in found.text and "turn, 1.00 ms" in found.text


def test_products_in_float_could_save_what_a_faster_type_would() -> None:
    attention = (layer("scores", ATTENTION, "fp32", 10**8), 1.0)
    (found,) = findings(profile(FAST, attention))
    assert found.saves_ms == pytest.approx(0.75)
    assert "attention runs in fp32 in 1 layer: 1.00 ms, 50% of the step" in found.text
    assert "100 GMAC/s in fp32, and 4.0 times as many in int8" in found.text and "although" not in found.text


def test_quantized_layers_that_ran_in_float_are_named() -> None:
    (found,) = findings(profile(FAST, (layer("fell", LINEAR, "fp32", 10**8), 1.0)), ["fell", "fast"])
    assert "linear runs in fp32 in 1 layer, 1 of them although quantized (fell, ...)" in found.text


def test_a_slow_layer_is_compared_with_the_best_of_its_type() -> None:
    (found,) = findings(profile(FAST, (layer("slow", CONVOLUTION, "int8", 4 * 10**8), 4.0)))
    assert found.saves_ms == pytest.approx(3.0)
    assert "slow: 4.00 ms at 25% of its peak in int8 (100 GMAC/s" in found.text
    assert "where fast reaches 100%" in found.text


def test_time_between_the_layers_counts_unless_other_programs_ran() -> None:
    (found,) = findings(profile(FAST, gap=0.5))
    assert found.saves_ms == pytest.approx(0.5) and "0.50 ms, 33% of the step, lie between its 1 kernels" in found.text
    assert findings(profile(FAST, gap=0.5, noise=1.0)) == []


def test_what_could_save_less_than_a_hundredth_is_left_out_and_five_are_shown_by_size() -> None:
    small = (layer("small", CONVERSION, "fp32", 0), 0.009)
    assert findings(profile(FAST, small)) == []
    many = profile(
        FAST,
        (layer("c", CONVERSION, "fp32", 0), 0.5),
        (layer("n", NORMALIZATION, "fp32", 0), 0.4),
        (layer("e", ELEMENTWISE, "fp32", 0), 0.3),
        (layer("a", ATTENTION, "fp32", 1), 0.8),
        (layer("l", LINEAR, "fp32", 1), 0.2),
        gap=0.25,
    )
    found = findings(many)
    assert len(found) == MOST and [one.saves_ms for one in found] == sorted(one.saves_ms for one in found)[::-1]
    assert "attention" in found[0].text and "linear" not in " ".join(one.text for one in found)
