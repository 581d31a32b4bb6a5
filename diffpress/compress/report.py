"""`diffpress report`: collect the results of a run into report.json and a self-contained report.html.

It only reads the output of the run: the bundles, scores, gates, latencies, and the comparison image.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from diffpress.compress.evaluation.summary import spread
from diffpress.compress.workspace import Workspace
from diffpress.runtime.benchmarking.bench import TORCH, table
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json_value, write_json, write_text

SHOWN_LAYERS = 10


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json and report.html into the folder of a compress run and return the report.

    Raises:
        InvalidInputError: `folder` is not the folder of a run.
    """
    run = Workspace(folder)
    if not run.recipe.is_file():
        raise InvalidInputError(f"{folder}: not the folder of a compress run, it has no {run.recipe.name}")
    bundle, baseline = load_bundle(run.bundle), load_bundle(run.baseline)
    onnx_mib, baseline_mib = (b.manifest["graphs"]["denoiser"]["bytes"] / 2**20 for b in (bundle, baseline))
    facts: dict[str, Any] = {
        "bundle": {"hash": bundle.hash, "denoiser_mib": onnx_mib, "size_ratio": onnx_mib / baseline_mib},
        "baseline": {"hash": baseline.hash, "denoiser_mib": baseline_mib},
        "components": _components(bundle, baseline),
        "recipe": _read(run.recipe),
        "history": bundle.manifest["history"],
        "parity": bundle.manifest["parity"],
        "engines": bundle.manifest["engines"],
        "variants": bundle.manifest["graphs"]["denoiser"].get("variants", {}),
        "evaluation": _read(run.evaluation),
        "gates": _read(run.gates),
        "latency": _read(run.latency),
        "bench": _read(run.bench),
    }
    write_json(run.report_data, facts)
    write_text(run.report_page, _page(facts, run.comparison))
    return facts


def _components(bundle: Bundle, baseline: Bundle) -> dict[str, dict[str, Any]]:
    """Return the size and precision of the other components, and what quantizing them costs in the image."""
    changed = [record["changed"].get("components", {}) for record in bundle.manifest["history"]]
    notes = {name: note for notes in changed for name, note in notes.items()}
    before = baseline.manifest["graphs"]
    return {
        name: {
            "mib": entry["bytes"] / 2**20,
            "baseline_mib": before[name]["bytes"] / 2**20,
            "precision": entry["precision"],
            **{key: value for key, value in notes.get(name, {}).items() if key.endswith("_db")},
        }
        for name, entry in bundle.manifest["graphs"].items()
        if name != "denoiser"
    }


def summary(facts: dict[str, Any]) -> str:
    """Format the summary table that compares the teacher with the bundle."""
    bundle, baseline = facts["bundle"], facts["baseline"]
    lines = [("", "teacher", "bundle", "ratio")]
    lines.append(
        (
            "denoiser.onnx, MiB",
            f"{baseline['denoiser_mib']:.2f}",
            f"{bundle['denoiser_mib']:.2f}",
            f"{bundle['size_ratio']:.3f}",
        )
    )
    for name, entry in facts["components"].items():
        old_mib, new_mib = entry["baseline_mib"], entry["mib"]
        lines.append((f"{name}.onnx, MiB", f"{old_mib:.2f}", f"{new_mib:.2f}", f"{new_mib / old_mib:.3f}"))
        if "image_psnr_db" in entry:
            lines.append((f"  image PSNR with it in {entry['precision']}, dB", "", f"{entry['image_psnr_db']:.1f}", ""))
    for entry in facts["engines"]:
        if entry.get("integer_mac_share") is not None:
            lines.append((f"integer MACs, {entry['engine']}", "", f"{100 * entry['integer_mac_share']:.1f} %", ""))
        if entry.get("fallbacks"):
            lines.append(("  quantized layers that ran in float", "", str(len(entry["fallbacks"])), ""))
    for mixed in _mixed(facts):
        in_float = f"{len(mixed['in_float'])} of {len(mixed['places'])}"
        lines.append(("kept in float to meet the target", "", in_float, ""))
    for row in (facts["latency"] or {}).get("engines", []):
        label = f"ms per step before and after quantization, {row['engine']}"
        ratio = f"{row['latency_ratio']:.2f}" + (", slower" if row["slower"] else "")
        lines.append((label, f"{row['float_ms']:.1f}", f"{row['quantized_ms']:.1f}", ratio))
    for engine, entry in facts["variants"].items():
        lines.append((f"  {engine} uses {entry['file']}, MiB", "", f"{entry['bytes'] / 2**20:.2f}", ""))
    evaluation = facts["evaluation"]
    if evaluation:
        ours, theirs = evaluation["bundle"], evaluation["baseline"]
        if ours["frechet"]:
            before, after, floor = theirs["frechet"], ours["frechet"], theirs["frechet"]["floor"]
            # below the distance of real images to each other, a ratio compares noise with noise
            measurable = max(before["mean"], after["mean"]) > floor
            ratio = f"{after['mean'] / before['mean']:.3f}" if measurable else "both below real images"
            name = f"Frechet distance ({ours['seeds']} x {ours['samples']})"
            lines.append((name, spread(before), spread(after), ratio))
            lines.append(("  real images", f"{floor:.3f}", "", ""))
            lines.append(("KID", spread(theirs["kid"], 4), spread(ours["kid"], 4), ""))
        if "clip_score" in ours:
            lines.append(("CLIP score", spread(theirs["clip_score"], 2), spread(ours["clip_score"], 2), ""))
        if "retrieval" in ours:
            name = f"retrieval accuracy among {ours['retrieval']['candidates']} texts"
            lines.append((name, spread(theirs["retrieval"]), spread(ours["retrieval"]), ""))
        if ours["label_accuracy"] is not None:
            lines.append(("label accuracy", f"{theirs['label_accuracy']:.3f}", f"{ours['label_accuracy']:.3f}", ""))
        if ours["paired"]:
            pairs = f"same plan, {ours['samples']} pairs"
            lines.append((f"PSNR to the teacher, dB ({pairs})", "", f"{ours['paired']['psnr_db']:.1f}", ""))
            lines.append(("SSIM to the teacher", "", f"{ours['paired']['ssim']:.3f}", ""))
    for name, old, new, ratio in _speeds(facts["bench"]):
        lines.append((name, old, new, ratio))
    widths = [max(len(line[i]) for line in lines) for i in range(4)]
    rows = [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return "\n".join([rows[0], "-" * len(rows[0]), *rows[1:]])


def _speeds(bench: dict[str, Any] | None) -> list[tuple[str, str, str, str]]:
    found = []
    for row in (bench or {}).get("rows", []):
        if row["precision"] == "fp32":
            continue
        same = [r for r in bench["rows"] if r["batch"] == row["batch"] and r is not row]  # type: ignore[index]
        for other in same:
            if other["engine"] in (TORCH, row["engine"]):
                label = (
                    f"ms per image, batch {row['batch']}: {other['engine']} {other['steps']} steps -> {row['engine']}"
                )
                found.append(
                    (
                        label,
                        f"{other['image_ms']:.1f}",
                        f"{row['image_ms']:.1f}",
                        f"{other['image_ms'] / row['image_ms']:.1f}x faster",
                    )
                )
    return found


def _teacher_sqnr_db(changed: dict[str, Any]) -> Any:
    return changed.get("teacher_sqnr_db", changed.get("sqnr_db_to_teacher"))  # the second name is that of diffpress 0.1


def _page(facts: dict[str, Any], picture: Path) -> str:
    image = ""
    if picture.is_file():
        data = base64.b64encode(picture.read_bytes()).decode()
        image = (
            f'<figure><img src="data:image/png;base64,{data}"><figcaption>Top: teacher. Bottom: bundle, from the '
            "same noise.</figcaption></figure>"
        )
    stages = "".join(
        f"<tr><td>{html.escape(r['stage'])}</td><td>{html.escape(_settings(r['config']))}</td>"
        f"<td>{r['changed']['parameters'][1]:,}</td><td>{r['changed']['macs'][1]:,}</td>"
        f"<td>{html.escape(str(r['changed']['plan'][1]))}</td><td>{_teacher_sqnr_db(r['changed'])}</td></tr>"
        for r in facts["history"]
    )
    bench = f"<h2>Speed</h2><pre>{html.escape(table(facts['bench']['rows']))}</pre>" if facts["bench"] else ""
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><title>diffpress report</title>
<style>body{{font:16px/1.5 system-ui;max-width:64rem;margin:2rem auto;padding:0 1rem}} img{{image-rendering:pixelated;
width:100%}} table{{border-collapse:collapse}} td,th{{padding:.2rem .8rem;border-bottom:1px solid #ccc;text-align:left}}
pre{{overflow-x:auto;background:#f5f5f5;padding:1rem}}</style>
<h1>diffpress report</h1>
<pre>{html.escape(summary(facts))}</pre>
{image}
<h2>Stages</h2>
<table><tr><th>stage</th><th>settings</th><th>parameters</th><th>MACs</th><th>plan</th><th>SQNR to teacher, dB</th></tr>
{stages}</table>
{"".join(map(_sensitivity, _mixed(facts)))}
{bench}
<h2>All data</h2>
<details><summary>report.json</summary><pre>{html.escape(json.dumps(facts, indent=1))}</pre></details>
</html>
"""


def _mixed(facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the results of mixed precision (compress/quantization/algorithms/mixed_precision.py) of each stage."""
    return [record["changed"]["mixed"] for record in facts["history"] if "mixed" in record["changed"]]


def _sensitivity(mixed: dict[str, Any]) -> str:
    """Format the most sensitive layers, with what quantizing each of them gains."""
    names = list(mixed["places"])[:SHOWN_LAYERS]
    heads = list(mixed["places"][names[0]])
    rows = "".join(
        f"<tr><td>{html.escape(name)}</td>"
        + "".join(f"<td>{mixed['places'][name][head]}</td>" for head in heads)
        + f"<td>{'float' if name in mixed['in_float'] else ''}</td></tr>"
        for name in names
    )
    figures = "; ".join(f"{what}: {_settings(mixed[what])}" for what in ("all_quantized", "chosen"))
    titles = "".join(f"<th>{head}</th>" for head in ("layer", *heads, "kept in"))
    return (
        f"<h2>Quantization sensitivity</h2><p>Output SQNR with only this layer quantized, target {mixed['target']}. "
        f"{html.escape(figures)}</p><table><tr>{titles}</tr>{rows}</table>"
    )


def _settings(config: dict[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in config.items())


def _read(path: Path) -> Any:
    return read_json_value(path) if path.is_file() else None
