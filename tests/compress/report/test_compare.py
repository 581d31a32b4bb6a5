"""compress/report/compare.py and `diffpress report A B`: several runs in one page, with what cannot be compared."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from diffpress.cli.main import main
from diffpress.compress.report.compare import COLUMNS
from tests.compress.report.made_run import bench, make_run, score
from tests.compress.report.test_page import check


@pytest.fixture
def runs(tmp_path: Path) -> list[Path]:
    slow = make_run(tmp_path / "slow", 1, bench=bench(50.0))
    fast = make_run(tmp_path / "fast", 12, bench=bench(10.0), evaluation={"baseline": score(0.8), "bundle": score(1.2)})
    return [slow, fast, make_run(tmp_path / "unmeasured", bench=None, evaluation=None, gates=None)]


def test_the_page_the_csv_and_the_json_have_a_row_for_every_run(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()}
    out = tmp_path / "made" / "compare.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in printed[1:4]] == ["slow", "fast", "unmeasured"]
    text = out.read_text(encoding="utf-8")
    check(text)
    assert text.count("<tr>") == 4 and 'aria-label="compared"' in text
    rows = json.loads(out.with_suffix(".json").read_text())["runs"]
    assert [row["image_ms"] for row in rows] == ["50.00 (openvino, batch 1)", "10.00 (openvino, batch 1)", "–"]
    assert [row["faster"] for row in rows] == ["2.00×", "10.00×", "–"]
    assert [row["frechet"] for row in rows] == ["0.900 ± 0.020", "1.200 ± 0.020", "–"]
    with out.with_suffix(".csv").open(encoding="utf-8") as file:
        assert [row["run"] for row in csv.DictReader(file)] == ["slow", "fast", "unmeasured"]
    assert len(rows[0]) == len(COLUMNS) + 1
    assert {path: path.read_bytes() for run in runs for path in run.rglob("*") if path.is_file()} == before


def test_distances_in_other_features_are_not_plotted_together(runs: list[Path], tmp_path: Path) -> None:
    other = {"baseline": score(0.8), "bundle": score(0.9)}
    other["bundle"]["features"]["sha256"] = "0" * 64
    foreign, out = make_run(tmp_path / "foreign", evaluation=other), tmp_path / "compare.html"
    assert main(["report", str(runs[0]), str(foreign), "--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    assert "different features or sample counts" in text and "<svg" not in text


def test_runs_of_one_name_are_told_apart_by_their_paths(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / name / "<b>run</b>".replace("/", ""), 1) for name in ("a", "b")]
    out = tmp_path / "compare.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    names = [row["run"] for row in json.loads(out.with_suffix(".json").read_text())["runs"]]
    assert names == [str(run) for run in runs]
    assert "<b>run" not in out.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("count", "words", "message"),
    [
        (2, [], "name it, as in --out compare.html"),
        (2, ["--out", "compare.txt"], "give a name that ends in .html"),
        (1, ["--out", "a.html"], "the report of one run is written into its folder"),
    ],
)
def test_a_wrong_out_is_refused_in_one_line(
    count: int, words: list[str], message: str, runs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", *map(str, runs[:count]), *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_folder_that_is_no_run_is_refused_before_anything_is_written(runs: list[Path], tmp_path: Path) -> None:
    out = tmp_path / "compare.html"
    assert main(["report", str(runs[0]), str(tmp_path), "--out", str(out)]) == 2
    assert not out.exists()


def test_the_report_of_one_run_is_printed_in_at_most_25_lines(
    runs: list[Path], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.compress.report.profiles.available", list)  # the made bundles have no real graph
    assert main(["report", str(runs[1])]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) <= 25 and lines[0].startswith("The bundle is 10.0 times faster")
    assert lines[-1] == f"report  {runs[1] / 'report.html'}"
