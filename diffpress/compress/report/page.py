"""The pages: templates filled with facts, plots and pictures. Everything is escaped but the SVG of plots.py."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from diffpress.compress.report import pictures, plots, profile_plots
from diffpress.compress.report.figures import figures_of
from diffpress.compress.report.layers import FLOAT
from diffpress.compress.report.tradeoff import tradeoff_of
from diffpress.compress.workspace import Workspace
from diffpress.runtime.benchmarking.advice import percent
from diffpress.runtime.benchmarking.bench import COLUMNS
from diffpress.runtime.benchmarking.profile_text import peaks_text, times_text
from diffpress.runtime.engines.executed_layers import OPERATIONS

TEMPLATES = Path(__file__).parent / "templates"
SENSITIVE_SHOWN = 10
LONGEST_SHOWN = 10
FORMAT_COLORS = ("int8", "w4a8", "int4", "int8_weight_only", "fp8", "nvfp4", FLOAT)  # .c-NAME in style.css


def report_page(facts: dict[str, Any], run: Workspace) -> str:
    """Return report.html of a run."""
    tradeoff = tradeoff_of(facts)
    arrays = pictures.arrays_of(run)
    return _render(
        "run.html",
        facts=facts,
        figures=[figure.cells for figure in figures_of(facts)],
        gates=[_gate(gate) for gate in facts["gates"] or []],
        pairs=pictures.pairs_of(run),
        gain=pictures.GAIN,
        image_grid=pictures.grid_of(run),
        signals=[] if arrays is None else plots.signals(*arrays),
        tradeoff=tradeoff,
        has_unscored=tradeoff is not None and any(point.quality is None for point in tradeoff.points),
        quality_plot=plots.quality_against_latency(tradeoff),
        stages_plot=plots.stages(facts["lineage"]),
        plan_plot=plots.sampling_plan(facts),
        training=[(curve, plots.training_curve(curve, i)) for i, curve in enumerate(facts["training"])],
        precision=_precision_map(facts["layers"]),
        bench=_bench(facts["bench"]),
        time=_time(facts["profile"]),
        machine=_machine(facts),
        command=_command(facts["run"]),
    )


def comparison_page(
    rows: Sequence[dict[str, Any]], columns: dict[str, str], notes: Sequence[str], plot: Markup | None
) -> str:
    """Return the page that compares several runs (compare.py)."""
    return _render("comparison.html", rows=rows, columns=columns, notes=notes, plot=plot)


def _render(name: str, **content: Any) -> str:
    environment = _environment()
    css = Markup((TEMPLATES / "style.css").read_text(encoding="utf-8"))
    return environment.get_template(name).render(css=css, **content)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "number": _number,
        "short": lambda text: str(text)[:12],
        "setting": _setting,
        "percent": _percent,
    }
    return environment


def _gate(gate: dict[str, Any]) -> dict[str, Any]:
    measured = gate.get("reason") or f"{_number(gate['value'])}, bound {_number(gate['bound'])}"
    return {"name": gate["gate"], "passed": gate["passed"], "measured": measured}


def _precision_map(layers: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the layers with what the map and its legend show: the share of weights in each format."""
    total = sum(layer["weights"] or 0 for layer in layers)
    weights: Counter[str] = Counter()
    for layer in layers:
        weights[layer["format"]] += layer["weights"] or 0
    counts = Counter(layer["format"] for layer in layers)
    formats = [
        {
            "name": name,
            "layers": count,
            "share": weights[name] / total if total else None,
            "mac_share": sum(layer["mac_share"] or 0.0 for layer in layers if layer["format"] == name),
        }
        for name, count in counts.most_common()
    ]
    engines = sorted({engine for layer in layers for engine in layer["executed"]})
    measured = sorted((one for one in layers if one["sqnr_db"] is not None), key=lambda one: one["sqnr_db"])
    return {
        "layers": [layer | {"color": _color(layer["format"]), "fell_back": _fell_back(layer)} for layer in layers],
        "formats": [entry | {"color": _color(entry["name"])} for entry in formats],
        "engines": engines,
        "has_sqnr": bool(measured),
        "has_weights": bool(total),
        "has_macs": any(layer["mac_share"] is not None for layer in layers),
        "sensitive": measured[:SENSITIVE_SHOWN],
    }


def _fell_back(layer: dict[str, Any]) -> bool:
    return any(what.startswith(f"{FLOAT}: ") for what in layer["executed"].values())


def _color(form: str) -> str:
    return form if form in FORMAT_COLORS else "other"


def _time(profiles: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return what the section of the profiles shows: plots, a row of each operation, and what is worth doing."""
    if profiles is None:
        return None
    before, after = ({row["operation"]: row for row in profiles[name]["operations"]} for name in ("baseline", "bundle"))
    shown = [operation for operation in OPERATIONS if operation in before or operation in after]
    return {
        "plot": profile_plots.time_by_operation(profiles),
        "roofline": profile_plots.roofline(profiles["bundle"]),
        "rows": [_operation(name, before.get(name), after.get(name)) for name in shown],
        "findings": profiles["bundle"]["findings"],
        "peaks": peaks_text(profiles["bundle"]["peaks"]),
        "bundle": profiles["bundle"],
        "times": {name: _times(profiles[name]) for name in ("baseline", "bundle")},
        "disturbed": profiles["baseline"]["disturbed"] or profiles["bundle"]["disturbed"],
        "longest": profiles["bundle"]["layers"][:LONGEST_SHOWN],
    }


def _operation(name: str, before: dict[str, Any] | None, after: dict[str, Any] | None) -> list[str]:
    """Return a row: operation, ms and share before and after, time of integer products, and the share of the peak."""
    cells = [name]
    for row in (before, after):
        cells += ["–", "–"] if row is None else [f"{row['ms']:.2f}", percent(row["share"])]
    has_products = after is not None and after["macs"] and after["ms"]
    cells.append(percent(after["integer_ms"] / after["ms"]) if after is not None and has_products else "–")
    cells.append("–" if after is None or after["of_peak"] is None else percent(after["of_peak"]))
    return cells


def _times(profile: dict[str, Any]) -> str:
    return times_text(profile, sum(row["kernels"] for row in profile["layers"]))


def _bench(bench: dict[str, Any] | None) -> dict[str, Any] | None:
    if not bench:
        return None
    rows = [[_cell(row.get(key), digits) for key, digits in COLUMNS.values()] for row in bench["rows"]]
    return {"columns": list(COLUMNS), "rows": rows, "machine": bench["machine"]}


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "–"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)


def _machine(facts: dict[str, Any]) -> dict[str, Any]:
    """Return what is known of the machine and the versions: of the last command, else of the benchmark."""
    run = facts["run"] or {}
    machine = run.get("machine") or (facts["bench"] or {}).get("machine") or {}
    listed = {name: ", ".join(map(str, value)) if isinstance(value, list) else value for name, value in machine.items()}
    known = {name.replace("_", " "): value for name, value in listed.items() if value not in (None, "")}
    return known | run.get("versions", {})


def _command(run: dict[str, Any] | None) -> str:
    """Return the command that made the run; for a run that did not store it, the one that repeats it."""
    if run and run["command"]:
        return shlex.join(run["command"])
    return "diffpress compress CHECKPOINT --recipe recipe.json --out DIR"


def _number(value: float | None) -> str:
    """Return a number with about four digits."""
    if value is None:
        return "–"
    if isinstance(value, float) and not math.isfinite(value):
        return "∞"
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _percent(ratio: float | None) -> str:
    return "–" if ratio is None else percent(ratio)


def _setting(value: object) -> str:
    """Return a setting's value, long lists cut in the middle."""
    if isinstance(value, list) and len(value) > 12:
        return f"[{', '.join(map(str, value[:5]))}, ... {len(value)} values]"
    return str(value)
