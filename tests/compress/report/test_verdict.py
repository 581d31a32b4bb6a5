"""compress/report/verdict.py: one sentence and four numbers, from whatever was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from diffpress.compress.report.facts import collect
from tests.compress.report.made_run import bench, make_run, score


def verdict(folder: Path, **parts: Any) -> tuple[str, dict[str, dict[str, Any]], bool | None]:
    found = collect(make_run(folder / "run", **parts))["verdict"]
    return found["sentence"], {number["name"]: number for number in found["numbers"]}, found["passed"]


def test_a_complete_run_has_four_numbers_and_its_gate(tmp_path: Path) -> None:
    sentence, numbers, passed = verdict(tmp_path)
    assert [numbers[name]["text"] for name in ("faster", "smaller", "quality", "integer")] == [
        "5.0×",
        "4.0×",
        "1.12×",
        "90.0 %",
    ]
    assert numbers["faster"]["value"] == pytest.approx(5.0) and "20.0× PyTorch eager" in numbers["faster"]["detail"]
    assert "1 quantized layer ran in float" in numbers["integer"]["detail"] and passed is True
    assert sentence == (
        "The bundle is 5.0 times faster than the teacher in openvino, 4.0 times smaller, and has a Fréchet distance of "
        "0.900 ± 0.020 against the teacher's 0.800 ± 0.020. It passed its gate."
    )


def test_failed_gates_are_in_the_sentence(tmp_path: Path) -> None:
    gates = [{"gate": name, "bound": 1.0, "value": 2.0, "passed": name == "a"} for name in ("a", "b", "c")]
    sentence, _, passed = verdict(tmp_path, gates=gates)
    assert sentence.endswith("It failed 2 of 3 gates: b, c.") and passed is False


def test_a_slower_bundle_is_called_slower(tmp_path: Path) -> None:
    sentence, numbers, _ = verdict(tmp_path, bench=bench(200.0))
    assert "2.0 times slower than the teacher in openvino" in sentence
    assert numbers["faster"]["label"] == "slower" and numbers["faster"]["text"] == "2.0×"
    assert numbers["faster"]["value"] == pytest.approx(0.5)


def test_a_difference_within_the_spread_of_the_seeds_is_called_so(tmp_path: Path) -> None:
    sentence, _, _ = verdict(tmp_path, evaluation={"baseline": score(0.80), "bundle": score(0.83)})
    assert "within the spread of the seeds" in sentence


def test_without_a_benchmark_the_speed_is_that_of_one_step(tmp_path: Path) -> None:
    row = {"engine": "openvino", "precision": "int8", "float_ms": 10.0, "quantized_ms": 4.0, "latency_ratio": 0.4}
    latency = {"batch": 8, "engines": [row | {"slower": False}]}
    _, numbers, _ = verdict(tmp_path, bench=None, latency=latency)
    assert numbers["faster"]["text"] == "2.5×" and numbers["faster"]["detail"].startswith("one step, int8 against")


def test_what_was_not_measured_has_no_number_and_says_what_would_measure_it(tmp_path: Path) -> None:
    sentence, numbers, passed = verdict(tmp_path, bench=None, evaluation=None, gates=[])
    assert sentence == "The bundle is 4.0 times smaller." and passed is None
    for name, hint in (("faster", "diffpress bench --json"), ("quality", "`evaluate`")):
        assert numbers[name]["text"] is numbers[name]["value"] is None and hint in numbers[name]["detail"]


def test_without_features_the_quality_is_the_psnr_to_the_teacher(tmp_path: Path) -> None:
    scores = {"baseline": score(0.8) | {"frechet": None}, "bundle": score(0.8, paired=True) | {"frechet": None}}
    sentence, numbers, _ = verdict(tmp_path, evaluation=scores)
    assert numbers["quality"]["text"] == "26.5 dB" and "reaches 26.5 dB PSNR" in sentence


def test_distances_not_above_that_of_real_images_are_not_compared(tmp_path: Path) -> None:
    sentence, numbers, _ = verdict(tmp_path, evaluation={"baseline": score(0.05), "bundle": score(0.09)})
    assert numbers["quality"]["value"] == 1.0 and "not above that of real images (0.100)" in sentence
