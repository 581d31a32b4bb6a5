"""The figures of a run for terminal, page and CSV: the teacher's value, the bundle's, and what changed."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from diffpress.compress.evaluation.summary import spread
from diffpress.runtime.benchmarking.bench import FLOAT, TORCH

COLUMNS = ("figure", "unit", "teacher", "teacher_sd", "bundle", "bundle_sd", "change")

# a number, or a mean with its standard deviation over seeds: {"mean", "sd"}
Value = float | dict[str, Any] | None


@dataclass(frozen=True)
class Figure:
    """One row of the summary.

    Attributes:
        name: What was measured.
        unit: Its unit, if it has one.
        teacher: The uncompressed model's value.
        bundle: The bundle's value.
        digits: Decimals to show.
        change: The bundle's value relative to the teacher's, as text.
        is_detail: Whether the row is left out first where there is no space.
    """

    name: str
    unit: str = ""
    teacher: Value = None
    bundle: Value = None
    digits: int = 3
    change: str = ""
    is_detail: bool = False

    @property
    def cells(self) -> tuple[str, str, str, str]:
        """The row as text: name with unit, teacher, bundle, change."""
        label = f"{self.name}, {self.unit}" if self.unit else self.name
        return label, self._text(self.teacher), self._text(self.bundle), self.change

    def _text(self, value: Value) -> str:
        if value is None:
            return ""
        return spread(value, self.digits) if isinstance(value, dict) else f"{value:.{self.digits}f}"


def figures_of(facts: dict[str, Any]) -> list[Figure]:
    """Return all figures of a report's facts, in the order in which they are shown."""
    return [*_sizes(facts), *_precision(facts), *_latency(facts), *_quality(facts["evaluation"]), *_speed(facts)]


def to_csv(figures: Sequence[Figure]) -> str:
    """Return the figures as CSV with the columns COLUMNS."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for figure in figures:
        writer.writerow([figure.name, figure.unit, *_pair(figure.teacher), *_pair(figure.bundle), figure.change])
    return text.getvalue()


def _pair(value: Value) -> tuple[float | None, float | None]:
    return (value["mean"], value["sd"]) if isinstance(value, dict) else (value, None)


def _sizes(facts: dict[str, Any]) -> Iterator[Figure]:
    bundle, baseline = facts["bundle"], facts["baseline"]
    sizes = (baseline["denoiser_mib"], bundle["denoiser_mib"])
    yield Figure("denoiser.onnx", "MiB", *sizes, 2, f"{bundle['size_ratio']:.3f}")
    for name, entry in facts["components"].items():
        ratio = f"{entry['mib'] / entry['baseline_mib']:.3f}"
        yield Figure(f"{name}.onnx", "MiB", entry["baseline_mib"], entry["mib"], 2, ratio)
        if "image_psnr_db" in entry:
            note = f"  image PSNR with it in {entry['precision']}"
            yield Figure(note, "dB", None, entry["image_psnr_db"], 1, is_detail=True)


def _precision(facts: dict[str, Any]) -> Iterator[Figure]:
    for entry in facts["engines"]:
        if entry.get("integer_mac_share") is not None:
            yield Figure(f"integer MACs in {entry['engine']}", "%", None, 100 * entry["integer_mac_share"], 1)
        if entry.get("fallbacks"):
            count = len(entry["fallbacks"])
            yield Figure("  quantized layers that ran in float", "", None, count, 0, is_detail=True)
    for mixed in mixed_precision(facts):
        count, note = len(mixed["in_float"]), f"of {len(mixed['places'])}"
        yield Figure("layers kept in float to meet the target", "", None, count, 0, note, is_detail=True)


def _latency(facts: dict[str, Any]) -> Iterator[Figure]:
    for row in (facts["latency"] or {}).get("engines", []):
        change = f"{row['latency_ratio']:.2f}" + (", slower" if row["slower"] else "")
        name = f"step before and after quantization, {row['engine']}"
        yield Figure(name, "ms", row["float_ms"], row["quantized_ms"], 1, change)
    for engine, entry in facts["variants"].items():
        yield Figure(f"  {engine} uses {entry['file']}", "MiB", None, entry["bytes"] / 2**20, 2, is_detail=True)


def _quality(evaluation: dict[str, Any] | None) -> Iterator[Figure]:
    if not evaluation:
        return
    ours, theirs = evaluation["bundle"], evaluation["baseline"]
    if ours["frechet"]:
        before, after, floor = theirs["frechet"], ours["frechet"], theirs["frechet"]["floor"]
        # below the distance of real images to each other, a ratio compares noise with noise
        is_measurable = max(before["mean"], after["mean"]) > floor
        change = f"{after['mean'] / before['mean']:.3f}" if is_measurable else "both below real images"
        yield Figure(f"Fréchet distance ({ours['seeds']} x {ours['samples']})", "", before, after, 3, change)
        yield Figure("  real images", "", floor, is_detail=True)
        yield Figure("KID", "", theirs["kid"], ours["kid"], 4, is_detail=True)
    if "clip_score" in ours:
        yield Figure("CLIP score", "", theirs["clip_score"], ours["clip_score"], 2, is_detail=True)
    if "retrieval" in ours:
        name = f"retrieval accuracy among {ours['retrieval']['candidates']} texts"
        yield Figure(name, "", theirs["retrieval"], ours["retrieval"])
    if ours["label_accuracy"] is not None:
        yield Figure("label accuracy", "", theirs["label_accuracy"], ours["label_accuracy"])
    if ours["paired"]:
        name = f"PSNR to the teacher (same plan, {ours['samples']} pairs)"
        yield Figure(name, "dB", None, ours["paired"]["psnr_db"], 1)
        yield Figure("SSIM to the teacher", "", None, ours["paired"]["ssim"], is_detail=True)


def _speed(facts: dict[str, Any]) -> Iterator[Figure]:
    rows = (facts["bench"] or {}).get("rows", [])
    for row in bundle_rows(facts):
        for other in rows:
            is_baseline = other["engine"] == TORCH or (
                other["engine"] == row["engine"] and other["name"] != row["name"]
            )
            if other["batch"] != row["batch"] or not is_baseline:
                continue
            name = f"image, batch {row['batch']}: {other['engine']} {other['steps']} steps -> {row['engine']}"
            ratio = other["image_ms"] / row["image_ms"]
            change = f"{ratio:.1f}x faster" if ratio >= 1.0 else f"{1.0 / ratio:.1f}x slower"
            yield Figure(name, "ms", other["image_ms"], row["image_ms"], 1, change)


def bundle_rows(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the benchmark's rows of the bundle: by its name, or those that are not fp32 in a benchmark without it."""
    rows = [row for row in (facts["bench"] or {}).get("rows", []) if row["engine"] != TORCH]
    named = [row for row in rows if row["name"] == facts["bundle"].get("name")]
    return named or [row for row in rows if row["precision"] != FLOAT]


def mixed_precision(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of mixed precision (compress/quantization/algorithms/mixed_precision.py) of each stage."""
    return [record["changed"]["mixed"] for record in facts["history"] if "mixed" in record["changed"]]
