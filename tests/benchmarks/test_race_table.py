"""benchmarks/race_table.py: the arithmetic of the table, what a failure looks like, and the verdicts."""

from __future__ import annotations

from typing import Any

import pytest
from race_table import markdown, subject_row, verdicts, with_ratios
from subjects import integer_share_outside_attention

Row = dict[str, Any]

MAKINGS: dict[str, Row] = {
    "write": {"step": "write", "parameters": 2**20, "seconds": 1.0, "peak_mib": 9.0},
    "fit": {"step": "fit", "r2": 0.6, "seconds": 1.0, "peak_mib": 9.0},
    "float": {"step": "float", "seconds": 3.0, "peak_mib": 9.0},
    "ptq": {"step": "ptq", "seconds": 20.0, "peak_mib": 5.0},
    "export": {
        "step": "export",
        "seconds": 33.0,
        "seconds_of": {"export": 10.0, "write and parity": 20.0},
        "peak_mib": 7.0,
        "parity_failures": [],
    },
    "nncf": {"step": "nncf", "seconds": 60.0, "peak_mib": 11.0},
}
MACHINE = {"cpu": "A", "cores": 2, "instruction_sets": ["avx2", "avx512_vnni"]}


def timed(*times_ms: float, load: float = 1.0, peak: float = 100.0) -> Row:
    return {"times_ms": list(times_ms), "load_seconds": load, "run_peak_mib": peak}


def compared(db: float = 30.0, share: float = 0.9, outside: float = 0.99) -> Row:
    quality = {"sqnr_db": db, "sqnr_min_db": db - 1.0, "x0_db": db - 5.0, "file_bytes": 2**20}
    return quality | {"integer_mac_share": share, "integer_share_outside_attention": outside}


def all_rows(ours_ms: float = 8.0, peer_ms: float = 10.0, ours_db: float = 30.0) -> list[Row]:
    timings = {
        "onnxruntime-fp32": 20.0,
        "onnxruntime-int8": 11.0,
        "openvino-fp32": 20.0,
        "openvino-int8": ours_ms + 1.0,
        "openvino-int8-bf16": ours_ms,
        "nncf": peer_ms,
        "nncf-bf16": peer_ms + 5.0,
    }
    return with_ratios(
        [
            subject_row(name, MAKINGS, compared(ours_db if "int8" in name else 29.0), [timed(ms)])
            for name, ms in timings.items()
        ]
    )


def test_the_share_of_the_roofline_is_the_bound_divided_by_the_time() -> None:
    roofline = {"peak_gmacs": {"fp32": 1.0, "bf16": 2.0, "int8": 4.0}, "layer_gmacs": 0.02, "attention_gmacs": 0.016}
    row = subject_row("openvino-int8-bf16", MAKINGS | {"roofline": roofline}, compared(), [timed(20.0)])
    assert row["of_roofline"] == pytest.approx((5.0 + 2.0 + 4.0) / 20.0)
    assert "of_roofline" not in subject_row("torch-fp32", MAKINGS | {"roofline": roofline}, compared(), [timed(20.0)])


def failed(rows: list[Row], model: str = "sd15", makings: dict[str, Row] = MAKINGS) -> list[str]:
    return [check["what"] for check in verdicts(model, False, rows, makings) if not check["passed"]]


def test_a_row_has_the_median_of_all_rounds_and_the_time_and_memory_of_its_own_making() -> None:
    timings = [timed(1.0, 2.0, load=9.0, peak=50.0), timed(4.0, 5.0, 6.0, load=3.0, peak=40.0)]
    row = subject_row("openvino-int8", MAKINGS, compared(), timings)
    assert (row["ms"], row["spread_ms"], row["load_seconds"], row["run_peak_mib"]) == (4.0, 2.5, [9.0, 3.0], 50.0)
    assert row["seconds_of"] == {"ptq": 20.0, "export": 10.0, "write and parity": 20.0} and row["make_peak_mib"] == 7.0
    assert "seconds_of" not in subject_row("torch-fp32", MAKINGS, compared(), timings)
    assert subject_row("nncf", MAKINGS, compared(), timings)["seconds_of"] == {"nncf": 60.0}


def test_times_are_divided_by_that_of_openvino_in_fp32() -> None:
    ratios = {row["subject"]: row["ratio"] for row in all_rows()}
    assert ratios["openvino-fp32"] == 1.0 and ratios["openvino-int8-bf16"] == 0.4 and ratios["nncf"] == 0.5
    alone = with_ratios([subject_row("nncf", MAKINGS, compared(), [timed(1.0)])])
    assert "ratio" not in alone[0]


def test_attention_in_float_does_not_count_outside_of_it() -> None:
    # 20 % attention in float, 8 % of all in one layer in float: 0.08 / 0.8 = 10 % outside
    assert integer_share_outside_attention({"node_MatMul_1": 0.2, "conv_in": 0.08}, ["conv_in", "a"]) == pytest.approx(
        0.9
    )
    assert integer_share_outside_attention({}, ["a"]) == 1.0


def test_a_subject_that_died_is_a_row_with_the_reason() -> None:
    killed = {"failed": "out of memory (killed)"}
    rows = [
        subject_row("nncf", MAKINGS, killed, [killed, killed]),
        subject_row("openvino-fp32", MAKINGS, killed, [timed(20.0), killed]),
    ]
    text = markdown("sd15", MACHINE, "", rows, [])
    assert "| NNCF int8 in OpenVINO, fp32 around | out of memory (killed) | - | - | - |" in text
    assert "| OpenVINO fp32 | 20.0 ± 0.0 | - | - | - |" in text
    assert "- OpenVINO fp32: timing 2: out of memory (killed)" in text and "- NNCF" not in text


def test_the_table_names_the_processor_and_divides_the_time_of_making() -> None:
    text = markdown("sd15", MACHINE, "1M parameters.", all_rows(), verdicts("sd15", False, all_rows(), MAKINGS))
    head, *lines = [line for line in text.splitlines() if line.startswith("|")]
    assert {line.count("|") for line in (head, *lines)} == {head.count("|")}
    assert "2 cores of A (avx512_vnni)" in text
    assert (
        "| 8.00 ± 0.00 | 0.40 | - | 30.0 (29.0) | 25.0 | 0.90 (0.99) | 50 = ptq 20 + export 10 + write and parity 20 |"
        in text
    )


def test_ours_must_be_faster_than_the_fastest_peer_without_losing_accuracy_or_effort() -> None:
    assert failed(all_rows()) == []
    slow = failed(all_rows(ours_ms=9.5))
    assert slow == ["time / NNCF int8 in OpenVINO, fp32 around"] and failed(all_rows(ours_ms=9.5), "sdxl") == []
    assert failed(all_rows(ours_db=28.0)) == ["SQNR, dB, against NNCF int8 in OpenVINO, fp32 around"]
    quick = MAKINGS | {"nncf": MAKINGS["nncf"] | {"seconds": 49.0}}
    rows = [
        subject_row("openvino-int8", quick, compared(), [timed(8.0)]),
        subject_row("nncf", quick, compared(), [timed(10.0)]),
    ]
    assert failed(rows, makings=quick) == ["seconds to make, against NNCF int8 in OpenVINO, fp32 around"]


def test_without_a_peer_ours_is_held_to_the_float_graph() -> None:
    rows = [row for row in all_rows(ours_ms=9.5) if not row["subject"].startswith("nncf")]
    died = with_ratios([*rows, subject_row("nncf", MAKINGS, {"failed": "no"}, [{"failed": "no"}])])
    assert failed(rows) == failed(died) == ["OpenVINO int8 / fp32"]


def test_every_other_bound_is_checked() -> None:
    changed = {
        "peak memory of making / fp32 weights": MAKINGS | {"ptq": MAKINGS["ptq"] | {"peak_mib": 8.1}},
        "R^2 on unseen states": MAKINGS | {"fit": {"r2": 0.4}},
        "parity failures": MAKINGS | {"export": MAKINGS["export"] | {"parity_failures": ["a"]}},
    }
    for what, makings in changed.items():
        rows = [subject_row("openvino-int8", makings, compared(), [timed(8.0)])]
        assert failed(rows, makings=makings) == [what]
    bad = {
        "SQNR of x_0, dB, OpenVINO int8 (diffpress), fp32 around": (compared(db=24.0), [timed(8.0)]),
        "integer MACs outside attention, OpenVINO int8 (diffpress), fp32 around": (compared(outside=0.9), [timed(8.0)]),
        "seconds to load again": (compared(), [timed(8.0), timed(8.0, load=3.1)]),
    }
    for what, (accuracy, timings) in bad.items():
        assert failed([subject_row("openvino-int8", MAKINGS, accuracy, timings)]) == [what]
    slow = with_ratios([row | {"ms": 19.0} if row["subject"] == "onnxruntime-int8" else row for row in all_rows()])
    assert failed(slow) == ["ONNX Runtime int8 / fp32"]


def test_a_check_of_our_own_that_was_not_measured_fails() -> None:
    rows = [subject_row("openvino-int8", MAKINGS, {"failed": "no"}, [{"failed": "no"}])]
    assert "SQNR of x_0, dB, OpenVINO int8 (diffpress), fp32 around" in failed(rows)
    assert "seconds to load again" in failed(rows)


def test_the_small_scale_checks_what_is_predicted_and_parity_alone() -> None:
    checks = verdicts("sd15", True, all_rows(ours_ms=30.0), MAKINGS)
    assert [check["what"] for check in checks] == ["R^2 on unseen states", "parity failures"]
