"""compress/report/page.py and its templates: valid, self-contained, escaped, whole with parts missing."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from justhtml import JustHTML

from diffpress.compress.report.write import write_report
from diffpress.compress.workspace import Workspace
from tests.compress.report.made_run import history, make_run, score

MAX_BYTES = 3_000_000
HOSTILE = "<script>alert('$x$')</script>\"><img src=x onerror=alert(1)>"
SECTIONS = {
    "Pictures",
    "Quality against cost",
    "Figures",
    "Benchmark",
    "Precision map",
    "Training",
    "Sampling plan",
    "Lineage",
    "Machine and versions",
    "Reproduce",
}
ALWAYS = {"Figures", "Quality against cost", "Precision map", "Sampling plan", "Lineage", "Reproduce"}


def page(root: Path) -> str:
    write_report(root)
    text = Workspace(root).report_page.read_text(encoding="utf-8")
    check(text)
    return text


def check(text: str) -> None:
    """Check that a page is valid HTML by the standard's parser, and needs nothing outside it."""
    parsed = JustHTML(text, collect_errors=True, sanitize=False)
    assert parsed.errors == []
    ids = re.findall(r'\sid="([^"]*)"', text)
    assert Counter(ids).most_common(1)[0][1] == 1
    assert set(re.findall(r'(?:url\(|href=")#([^")]*)', text)) <= set(ids)
    assert len(text.encode()) < MAX_BYTES
    assert "://" not in text and "@import" not in text
    assert parsed.query("script, link, iframe, object, embed, base, form") == []
    attributes = [(name, value) for node in parsed.query("*") for name, value in (node.attrs or {}).items()]
    assert all((value or "").startswith("data:image/") for name, value in attributes if name == "src")
    assert all((value or "").startswith("#") for name, value in attributes if name == "href")
    assert not [name for name, _ in attributes if name.startswith("on")]


def sections(text: str) -> set[str]:
    return set(re.findall(r"<h[23]>([^<]*)</h[23]>", text)) & SECTIONS


@pytest.mark.parametrize("stages", [1, 3, 12])
def test_runs_of_any_length_have_every_stage_and_section(stages: int, tmp_path: Path) -> None:
    text = page(make_run(tmp_path / "run", stages))
    assert re.findall(r"<li><b>(\d+) (\w+)</b>", text) == [
        (str(i), record["stage"]) for i, record in enumerate(history(stages), 1)
    ]
    assert sections(text) == SECTIONS - ({"Training"} if stages < 4 else set())
    assert text.count("<svg") == 3 + sum(record["stage"] == "distill" for record in history(stages))


@pytest.mark.parametrize(
    ("missing", "gone"),
    [
        ({"evaluation": None}, set()),
        ({"bench": None}, {"Benchmark"}),
        ({"pictures": False}, {"Pictures"}),
        ({"gates": None}, set()),
        ({"losses": False}, {"Training"}),
        ({"checkpoint": False}, set()),
        ({"invocation": False, "bench": None}, {"Benchmark", "Machine and versions"}),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_a_section_without_data_is_left_out(missing: dict[str, Any], gone: set[str], tmp_path: Path) -> None:
    assert sections(page(make_run(tmp_path / "run", 4, **missing))) == SECTIONS - gone


def test_a_bare_run_still_has_a_page(tmp_path: Path) -> None:
    parts: dict[str, Any] = {"pictures": False, "checkpoint": False, "losses": False, "invocation": False}
    text = page(make_run(tmp_path / "run", evaluation=None, bench=None, gates=None, **parts))
    assert sections(text) == ALWAYS and "not measured" in text
    assert "diffpress compress CHECKPOINT --recipe recipe.json --out DIR" in text


def test_a_failed_gate_is_shown_with_its_reason(tmp_path: Path) -> None:
    gate = {"gate": "parity_sqnr_db", "bound": 20.0, "value": None, "passed": False, "reason": "was not measured"}
    text = page(make_run(tmp_path / "run", gates=[gate]))
    assert re.search(r'class="failed">✗ failed <span>parity_sqnr_db: was not measured</span>', text)


def test_hostile_names_are_escaped_everywhere(tmp_path: Path) -> None:
    root = make_run(tmp_path / "<script>", 4, command=("diffpress", "compress", HOSTILE))
    run = Workspace(root)
    for bundle in (run.baseline, run.bundle):
        _rename_(bundle)
    scores = {"baseline": score(0.8), "bundle": score(0.9, paired=True)}
    scores["bundle"]["features"]["name"] = HOSTILE
    run.evaluation.write_text(json.dumps(scores))
    bench = json.loads(run.bench.read_text())
    for row in bench["rows"]:
        row["name"] += HOSTILE
        row["engine"] += "" if row["engine"] == "torch" else HOSTILE
    bench["machine"]["cpu"] = HOSTILE
    run.bench.write_text(json.dumps(bench))
    run.gates.write_text(
        json.dumps([{"gate": HOSTILE, "bound": 1.0, "value": None, "passed": False, "reason": HOSTILE}])
    )
    pixels = np.zeros((1, 8, 8, 3), np.uint8)
    np.savez(run.pairs, teacher=pixels, bundle=pixels, prompts=np.array([HOSTILE]))
    text = page(root)
    assert text.count("&lt;script&gt;alert(") > 10


def _rename_(bundle: Path) -> None:
    """Put hostile names into the manifest of a bundle: its own, those of stages, settings, layers and engines."""
    from diffpress.runtime.bundle import seal

    manifest = json.loads((bundle / "manifest.json").read_text())
    manifest["name"] += HOSTILE
    for record in manifest["history"]:
        record["stage"], record["config"] = HOSTILE, {HOSTILE: HOSTILE}
    manifest["graphs"]["denoiser"]["quantized_layers"].append(HOSTILE)
    manifest["engines"].append({"engine": HOSTILE, "graph": "denoiser.onnx", "integer_mac_share": 0.5, "fallbacks": []})
    manifest["engines"][-1]["fallbacks"].append({"layer": HOSTILE, "reason": HOSTILE})
    manifest["graphs"]["denoiser"]["variants"] = {HOSTILE: {"file": "denoiser.onnx", "bytes": 1, "precision": "int8"}}
    seal(bundle, {key: value for key, value in manifest.items() if key not in ("hash", "files", "format")})


def test_samples_that_are_no_pictures_are_drawn_as_curves(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", pictures=False)
    values = np.linspace(0, 1, 2 * 3 * 50, dtype=np.float32).reshape(2, 3, 50)
    np.savez(Workspace(root).comparison_arrays, teacher=values, bundle=values + 0.1)
    text = page(root)
    assert text.count('aria-label="signal-') == 2 and "<h2>Samples</h2>" in text


def test_an_older_run_shows_its_image_grid(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run", pictures=False)
    Workspace(root).comparison.write_bytes(b"the bytes of a picture")
    assert 'class="image-grid" src="data:image/png;base64,dGhlIGJ5dGVz' in page(root)


def test_large_pictures_stay_within_the_size(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    noise = np.random.default_rng(0).integers(0, 256, (8, 512, 512, 3), dtype=np.uint8)
    np.savez(Workspace(root).pairs, teacher=noise, bundle=noise[::-1], prompts=np.array([], dtype=str))
    assert 1 <= page(root).count('class="pair"') < 8


def test_the_table_beside_the_page_has_its_figures(tmp_path: Path) -> None:
    root = make_run(tmp_path / "run")
    text = page(root)
    rows = Workspace(root).report_table.read_text().splitlines()
    assert len(rows) - 1 == text.count('data-label="teacher"') and rows[1].startswith(
        "denoiser.onnx,MiB,4.0,,1.0,,0.250"
    )
