"""compress/report/profiles.py and profile_plots.py: when profiles are measured, and what the report shows of them."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from diffpress.compress.report import profile_plots, profiles
from diffpress.compress.report.facts import collect
from diffpress.compress.report.page import TEMPLATES
from diffpress.compress.report.profiles import measure_profiles
from diffpress.compress.workspace import Workspace
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from tests.compress.report.made_profile import FLOAT_MS, INTEGER_MS, TURN_MS, write_profiles
from tests.compress.report.made_run import KEPT_IN_FLOAT, LAYERS, make_run
from tests.compress.report.test_page import HOSTILE, page


@pytest.fixture
def run(tmp_path: Path) -> Workspace:
    return Workspace(make_run(tmp_path / "run", 4))


@pytest.fixture
def profiled(run: Workspace) -> Workspace:
    write_profiles(run.root)
    return run


def test_the_page_shows_the_time_of_each_operation_before_and_after(profiled: Workspace) -> None:
    text = page(profiled.root)
    section = text.split("<h2>Where the time goes</h2>")[1].split("<h2>")[0]
    assert 'aria-label="time-by-operation"' in section and 'aria-label="roofline"' in section
    table = section.split("<tbody>")[1].split("</tbody>")[0].split("<tr>")[1:]
    rows = {cells[0]: cells[1:] for cells in (re.findall(r"<td[^>]*>([^<]*)</td>", row) for row in table)}
    before, after = 4 * FLOAT_MS, 3 * INTEGER_MS + FLOAT_MS
    assert rows["convolution"][:1] == [f"{before:.2f}"] and rows["convolution"][2] == f"{after:.2f}"
    assert rows["convolution"][4] == f"{3 * INTEGER_MS / after:.0%}"  # one of four convolutions is in float
    assert rows["reorder/conversion"][:4] == ["–", "–", f"{TURN_MS:.2f}", "20%"]  # 0.5 of 2.5 ms
    assert "reorders and conversions take" in section and "Other programs" not in section


def test_layers_of_the_precision_map_have_their_share_of_the_macs_and_their_time(profiled: Workspace) -> None:
    layers = {layer["layer"]: layer for layer in collect(profiled.root)["layers"]}
    assert {name: layer["mac_share"] for name, layer in layers.items()} == dict.fromkeys(LAYERS, 1 / len(LAYERS))
    assert layers[KEPT_IN_FLOAT]["ms"] == FLOAT_MS and layers[LAYERS[0]]["ms"] == INTEGER_MS
    text = page(profiled.root)
    assert "% of the MACs" in text and 'data-label="share of MACs">20%<' in text


def test_without_profiles_only_their_section_and_columns_are_missing(run: Workspace, tmp_path: Path) -> None:
    text = page(run.root)
    assert "Where the time goes" not in text and "of the MACs<" not in text and "share of MACs" not in text
    assert "<h2>Precision map</h2>" in text


def test_profiles_of_another_bundle_or_of_another_form_are_not_shown(profiled: Workspace) -> None:
    found = json.loads(profiled.profile.read_text())
    found["bundle"]["bundle"]["hash"] = "0" * 64
    profiled.profile.write_text(json.dumps(found))
    assert collect(profiled.root)["profile"] is None
    profiled.profile.write_text(json.dumps({"baseline": 1}))
    assert collect(profiled.root)["profile"] is None
    profiled.profile.write_text("{")
    with pytest.raises(InvalidInputError, match=r"profile\.json: not readable as JSON"):
        collect(profiled.root)


def test_hostile_names_of_layers_are_escaped(run: Workspace) -> None:
    write_profiles(run.root, (HOSTILE, *LAYERS))
    assert "&lt;script&gt;alert(" in page(run.root)


def test_plots_use_the_colors_of_the_page(profiled: Workspace) -> None:
    found = collect(profiled.root)["profile"]
    svg = f"{profile_plots.time_by_operation(found)}{profile_plots.roofline(found['bundle'])}"
    assert not re.search(r"#[0-9a-f]{6}", svg)
    for name in set(re.findall(r"var\(--(\w+)\)", svg)):
        assert (TEMPLATES / "style.css").read_text().count(f"--{name}:") == 3
    assert "int8 800" in svg and "fp32 200" in svg  # GFLOP/s: two for each multiply-accumulate
    without = found["bundle"] | {"layers": [row for row in found["bundle"]["layers"] if not row["macs"]]}
    assert profile_plots.roofline(without) is None and profile_plots.time_by_operation(None) is None


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch, profiled: Workspace) -> list[str]:
    """Replace profiling by the made profiles; returns the names of the bundles that were profiled."""
    made, names = json.loads(profiled.profile.read_text()), list[str]()

    def profile_bundle(bundle: Any, *_: object, **__: object) -> dict[str, Any]:
        names.append(bundle.path.name)
        return dict(made[bundle.path.name])

    monkeypatch.setattr(profiles, "profile_bundle", profile_bundle)
    profiled.profile.unlink()
    return names


def test_both_bundles_are_profiled_once(measured: list[str], run: Workspace) -> None:
    measure_profiles(run)
    measure_profiles(run)
    assert measured == ["baseline", "bundle"] and collect(run.root)["profile"]["bundle"]["engine"] == "openvino"


@pytest.mark.parametrize("reason", ["a graph has", "an engine refuses", "no engine here"])
def test_what_cannot_be_profiled_in_seconds_is_left_out_with_the_reason(
    reason: str,
    measured: list[str],
    run: Workspace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise EngineUnavailableError("an engine refuses")

    if reason == "a graph has":
        monkeypatch.setattr(profiles, "MOST_MIB", 1.0)
    elif reason == "no engine here":
        monkeypatch.setattr(profiles, "available", list)
    else:
        monkeypatch.setattr(profiles, "profile_bundle", refuse)
    assert (measure_profiles(run) or "").startswith(reason)
    assert not run.profile.exists() and collect(run.root)["profile"] is None


def test_a_real_bundle_is_profiled(run: Workspace, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.runtime.benchmarking.profiling.BLOCKS", 1)
    monkeypatch.setattr("diffpress.runtime.benchmarking.peaks.PROFILERS", 1)
    monkeypatch.setattr("diffpress.runtime.benchmarking.peaks.COPIED_MIB", (0.25, 1.0))
    monkeypatch.setattr("diffpress.runtime.benchmarking.peak_kernels.SIZES", {"fp32": (32, 64, 16)})
    monkeypatch.setattr("diffpress.runtime.benchmarking.peak_kernels.FAST", (32, 64, 16))
    monkeypatch.setattr(profiles, "ENGINES", ("onnxruntime",))
    monkeypatch.setenv("DIFFPRESS_CACHE", str(run.root / "cache"))
    for folder in (run.baseline, run.bundle):
        shutil.rmtree(folder)
        shutil.copytree(tiny_bundle, folder)
    measure_profiles(run)
    found = json.loads(run.profile.read_text())
    assert found.keys() == {"baseline", "bundle"}
    assert profiles.profiles_of(run, {"bundle": load_bundle(run.bundle)}) == found


@pytest.fixture
def tiny_bundle() -> Path:
    return Path(__file__).parents[2] / "runtime" / "tiny_bundle"
