"""`diffpress report A B C`: several runs in one table and one plot of quality against latency.

Numbers of two runs can be compared only if they were measured alike: the same machine, features and sample counts. What
differs is said above the table; distances in other features are not plotted together.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.compress.evaluation.summary import spread
from diffpress.compress.report import plots
from diffpress.compress.report.facts import collect
from diffpress.compress.report.figures import bundle_rows
from diffpress.compress.report.page import comparison_page
from diffpress.compress.report.summary import aligned
from diffpress.compress.report.tradeoff import tradeoff_of
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import write_json, write_text

# heading -> key of a row
COLUMNS = {
    "run": "run",
    "stages": "stages",
    "plan": "plan",
    "MiB": "mib",
    "smaller": "smaller",
    "ms per image": "image_ms",
    "faster": "faster",
    "Fréchet distance": "frechet",
    "teacher's": "teacher_frechet",
    "PSNR, dB": "psnr_db",
    "integer MACs": "integer",
    "gates": "gates",
}


def write_comparison(folders: Sequence[Path], out: Path) -> list[dict[str, Any]]:
    """Write the comparison of runs as `out` (HTML), with the rows as JSON and CSV beside it, and return the rows.

    Raises:
        InvalidInputError: A folder is not that of a run, or `out` is no .html file.
    """
    if out.suffix.lower() not in (".html", ".htm"):
        raise InvalidInputError(f"--out {out}: the comparison is a web page; give a name that ends in .html")
    runs = [collect(folder) for folder in folders]
    rows = [
        _row(number, name, facts) for number, (name, facts) in enumerate(zip(_names(folders), runs, strict=True), 1)
    ]
    notes, features = _notes(runs), {_scored_with(facts) for facts in runs} - {None}
    points = [tradeoff_of(facts) for facts in runs] if len(features) == 1 else []
    plot = plots.compared({number: point for number, point in enumerate(points, 1) if point is not None})
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([["number", *COLUMNS.values()], *(row.values() for row in rows)])
    page = comparison_page(rows, COLUMNS, notes, plot)
    write_json(out.with_suffix(".json"), {"runs": rows, "notes": notes})
    write_text(out.with_suffix(".csv"), text.getvalue())
    write_text(out, page)
    return rows


def comparison_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the main columns as text."""
    keys = ("run", "mib", "image_ms", "faster", "frechet", "integer", "gates")
    titles = {key: title for title, key in COLUMNS.items()}
    lines = [[titles[key] for key in keys], *([str(row[key]) for key in keys] for row in rows)]
    return "\n".join(row.rstrip() for row in aligned(lines))


def _row(number: int, name: str, facts: dict[str, Any]) -> dict[str, Any]:
    """Return the row of a run, everything as text: a dash for what was not measured."""
    timed = min(bundle_rows(facts), key=lambda row: (row["batch"], row["image_ms"]), default=None)
    scores, plan = facts["evaluation"], facts["bundle"]["plan"]
    ours, theirs = (scores[which]["frechet"] if scores else None for which in ("bundle", "baseline"))
    paired = scores and scores["bundle"]["paired"]
    numbers = {number["name"]: number["text"] or "–" for number in facts["verdict"]["numbers"]}
    speed = next(number for number in facts["verdict"]["numbers"] if number["name"] == "faster")
    gates = facts["gates"] or []
    size = facts["bundle"]["denoiser_mib"] + sum(part["mib"] for part in facts["components"].values())
    return {
        "number": number,
        "run": name,
        "stages": " > ".join(record["stage"] for record in facts["history"]) or "–",
        "plan": f"{plan['solver']}, {len(plan['timesteps'])} steps",
        "mib": f"{size:.2f}",
        "smaller": numbers["smaller"],
        "image_ms": "–" if timed is None else f"{timed['image_ms']:.2f} ({timed['engine']}, batch {timed['batch']})",
        "faster": "–" if speed["value"] is None else f"{speed['value']:.2f}×",
        "frechet": spread(ours) if ours else "–",
        "teacher_frechet": spread(theirs) if theirs else "–",
        "psnr_db": f"{paired['psnr_db']:.1f}" if paired else "–",
        "integer": numbers["integer"],
        "gates": f"{sum(gate['passed'] for gate in gates)} of {len(gates)} passed" if gates else "–",
    }


def _names(folders: Sequence[Path]) -> list[str]:
    """Return the folders' names, or the paths as given if two have the same name."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def _notes(runs: Sequence[dict[str, Any]]) -> list[str]:
    """Say in which conditions of measurement the runs differ."""
    notes = []
    if len({_scored_with(facts) for facts in runs} - {None}) > 1:
        notes.append("The runs were scored with different features or sample counts: do not compare their distances.")
    if len({facts["baseline"]["hash"] for facts in runs}) > 1:
        notes.append("The runs have different teachers: sizes and speeds are each relative to its own.")
    benches = [facts["bench"] for facts in runs if facts["bench"]]
    if len({str((bench["machine"].get("cpu"), bench["machine"].get("cores"))) for bench in benches}) > 1:
        notes.append("The runs were timed on different machines: do not compare their milliseconds.")
    elif len(benches) > 1:
        notes.append("Each run was timed by itself: small differences of milliseconds may be noise of the machine.")
    return notes


def _scored_with(facts: dict[str, Any]) -> tuple[Any, ...] | None:
    scores = facts["evaluation"]
    if not scores or not scores["bundle"]["frechet"]:
        return None
    score = scores["bundle"]
    return score["features"]["sha256"], score["samples"], score["seeds"]
