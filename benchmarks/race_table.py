"""Rows of a race's table from what its processes measured, its verdicts, and the table in Markdown.

    ms           median over the repeats of all rounds, with half the range of these repeats
    ratio        ms / ms of OpenVINO fp32
    of_roofline  time of the products at the machine's measured peaks / ms (roofline.py)
    seconds      of the steps that made the subject's own model: PTQ, export and parity for diffpress, PTQ for a peer

A subject of which a process died has the reason instead of the numbers of that process.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from checks import check, check_line
from roofline import bound_ms
from subjects import REFERENCE, SUBJECTS

Row = dict[str, Any]
EXACT_DB = 200.0  # SQNR of equal arrays

R2, INT8_X0_DB, INTEGER_SHARE = 0.5, 20.0, 0.95
TIME_OF_PEER = {"sd15": 0.90, "dit_xl": 0.90, "sdxl": 1.0}  # ours / fastest peer
TIME_OF_FLOAT = 0.45  # OpenVINO int8 / fp32, if no peer could be measured
ONNXRUNTIME_TIME = 0.60  # int8 / fp32
MEMORY_OF_WEIGHTS = 2.0  # peak memory of making / bytes of the weights in fp32
LOAD_SECONDS = 3.0  # of a process that finds the compiled model


def subject_row(name: str, makings: Mapping[str, Row], accuracy: Row, timings: Sequence[Row]) -> Row:
    """Merge what was measured of one subject.

    Args:
        name: Key of SUBJECTS.
        makings: Step -> its row.
        accuracy: Row of the accuracy process.
        timings: Rows of the timing processes.
    """
    failures = {f"timing {index + 1}": row["failed"] for index, row in enumerate(timings) if "failed" in row}
    failures |= {"accuracy": accuracy["failed"]} if "failed" in accuracy else {}
    row: Row = {"subject": name, "label": SUBJECTS[name].label, "failed": failures}
    row |= {key: value for key, value in accuracy.items() if key not in ("failed", "phase", "done_before")}
    measured = [timing for timing in timings if "failed" not in timing]
    if measured:
        times = [ms for timing in measured for ms in timing["times_ms"]]
        row |= {"ms": statistics.median(times), "spread_ms": (max(times) - min(times)) / 2.0}
        row["run_peak_mib"] = max(timing["run_peak_mib"] for timing in measured)
        row["load_seconds"] = [timing["load_seconds"] for timing in measured]
        bound = bound_ms(makings.get("roofline", {}), name)
        row |= {} if bound is None else {"of_roofline": bound / row["ms"]}
    made = [makings[step] for step in SUBJECTS[name].made_by if "seconds" in makings.get(step, {})]
    if made:
        row["seconds_of"] = {part: value for step in made for part, value in seconds_of(step).items()}
        row["make_peak_mib"] = max(step["peak_mib"] for step in made)
    return row


def seconds_of(making: Row) -> dict[str, float]:
    """Return the seconds of a step by part; what no part covers is the step's own."""
    parts: dict[str, float] = making.get("seconds_of") or {making["step"]: making["seconds"]}
    return parts


def with_ratios(rows: Sequence[Row]) -> list[Row]:
    """Return the rows with `ratio`, the time divided by that of REFERENCE, if both were timed."""
    reference = next((row.get("ms") for row in rows if row["subject"] == REFERENCE), None)
    return [row | {"ratio": row["ms"] / reference} if reference and "ms" in row else row for row in rows]


# --- verdicts ----------------------------------------------------------------------------------------------------


def verdicts(model: str, small: bool, rows: Sequence[Row], makings: Mapping[str, Row]) -> list[Row]:
    """Compare the results with their bounds; return rows of {"what", "value", "bound", "passed"}.

    Checks of subjects that did not take part are left out; of a subject that failed, they fail. At the small scale time
    and memory say nothing about the real size, so only what the network predicts and parity are checked.
    """
    found = [check("R^2 on unseen states", makings["fit"].get("r2"), ">=", R2)]
    if "export" in makings:
        failures = makings["export"].get("parity_failures")
        found.append(check("parity failures", None if failures is None else len(failures), "<=", 0))
    if small:
        return found
    table = {row["subject"]: row for row in rows}
    ours = {name: row for name, row in table.items() if SUBJECTS[name].ours}
    in_openvino = [row for name, row in ours.items() if name.startswith("openvino")]
    best = min(in_openvino, key=lambda row: row.get("ms", float("inf")), default={})
    if best:
        peers = [row for row in rows if SUBJECTS[row["subject"]].peer and {"ms", "sqnr_db"} <= row.keys()]
        found += _against_peers(model, best, peers, table.get(REFERENCE, {}))
    if "onnxruntime-int8" in table and "onnxruntime-fp32" in table:
        ratio = _ratio(table["onnxruntime-int8"], table["onnxruntime-fp32"])
        found.append(check("ONNX Runtime int8 / fp32", ratio, "<=", ONNXRUNTIME_TIME))
    for row in ours.values():
        found.append(check(f"SQNR of x_0, dB, {row['label']}", row.get("x0_db"), ">=", INT8_X0_DB))
        share = row.get("integer_share_outside_attention")
        found.append(check(f"integer MACs outside attention, {row['label']}", share, ">=", INTEGER_SHARE))
    if best:
        weights_mib = 4 * makings["write"]["parameters"] / 2**20
        peak = best.get("make_peak_mib")
        memory = None if peak is None else peak / weights_mib
        found.append(check("peak memory of making / fp32 weights", memory, "<=", MEMORY_OF_WEIGHTS))
        found.append(check("seconds to load again", best.get("load_seconds", [None])[-1], "<=", LOAD_SECONDS))
    return found


def _against_peers(model: str, best: Row, peers: Sequence[Row], reference: Row) -> list[Row]:
    """Compare our fastest row with the fastest peer, or with the float graph if no peer was measured."""
    if not peers:
        return [check("OpenVINO int8 / fp32", _ratio(best, reference), "<=", TIME_OF_FLOAT)] if reference else []
    peer = min(peers, key=lambda row: row["ms"])
    found = [
        check(f"time / {peer['label']}", _ratio(best, peer), "<=", TIME_OF_PEER[model]),
        check(f"SQNR, dB, against {peer['label']}", best.get("sqnr_db"), ">=", peer["sqnr_db"]),
    ]
    if "seconds_of" in peer:
        seconds = sum(best["seconds_of"].values()) if "seconds_of" in best else None
        bound = sum(peer["seconds_of"].values())
        found.append(check(f"seconds to make, against {peer['label']}", seconds, "<=", bound))
    return found


def _ratio(row: Row, other: Row) -> float | None:
    return row["ms"] / other["ms"] if "ms" in row and "ms" in other else None


# --- Markdown ----------------------------------------------------------------------------------------------------

HEAD = (
    "subject",
    "ms",
    "/ OpenVINO fp32",
    "of the roofline",
    "SQNR dB (min)",
    "x_0 dB",
    "integer MACs (outside attention)",
    "seconds to make",
    "peak MiB making / running",
    "file MiB",
    "load s, first / second process",
)


def markdown(title: str, machine: Mapping[str, Any], facts: str, rows: Sequence[Row], checks: Sequence[Row]) -> str:
    """Return the table of a race with its machine, the reasons of failures and the verdicts."""
    processor = ", ".join(
        name for name in machine["instruction_sets"] if name.startswith(("avx512", "avx_vnni", "amx"))
    )
    lines = [f"**{title}**, {machine['cores']} cores of {machine['cpu']} ({processor or 'no AVX-512'}). {facts}", ""]
    lines += [_line(HEAD), _line(["---"] * len(HEAD)), *(_line(_cells(row)) for row in rows)]
    failed = [
        f"- {row['label']}: {phase}: {why}"
        for row in rows
        for phase, why in row["failed"].items()
        if why != _reason(row)
    ]
    lines += ["", *failed] if failed else []
    return "\n".join([*lines, "", *(check_line(row) for row in checks)])


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cells(row: Row) -> list[str]:
    ms = _reason(row) or f"{row['ms']:.{_digits(row['ms'])}f} ± {row['spread_ms']:.{_digits(row['ms'])}f}"
    parts = row.get("seconds_of", {})
    made = " + ".join(f"{part} {seconds:.0f}" for part, seconds in parts.items())
    return [
        row["label"],
        ms,
        _number(row.get("ratio"), 2),
        _number(row.get("of_roofline"), 2),
        f"{_db(row['sqnr_db'])} ({_db(row['sqnr_min_db'])})" if "sqnr_db" in row else "-",
        _db(row.get("x0_db")),
        f"{row['integer_mac_share']:.2f} ({row['integer_share_outside_attention']:.2f})"
        if "integer_mac_share" in row
        else "-",
        f"{sum(parts.values()):.0f} = {made}" if len(parts) > 1 else made or "-",
        f"{_number(row.get('make_peak_mib'), 0)} / {_number(row.get('run_peak_mib'), 0)}",
        _number(row["file_bytes"] / 2**20 if "file_bytes" in row else None, 1),
        " / ".join(f"{seconds:.1f}" for seconds in row.get("load_seconds", [])) or "-",
    ]


def _reason(row: Row) -> str:
    """Return what stands in place of the time of a row that has none."""
    return "" if "ms" in row else next(iter(row["failed"].values()), "-")


def _digits(ms: float) -> int:
    return 0 if ms >= 100.0 else 1 if ms >= 10.0 else 2


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def _db(value: float | None) -> str:
    return "exact" if value == EXACT_DB else _number(value, 1)
