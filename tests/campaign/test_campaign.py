"""The campaigns can be run, count what they try, and notice what they look for."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from tests.campaign.__main__ import CAMPAIGNS, main
from tests.campaign.result import Result
from tests.campaign.soak import _growth
from tests.campaign.states import half_written, is_temporary, lasting_state
from tests.campaign.worker import ROOT, Worker

TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
NEEDS_CC = pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")


def test_a_result_counts_trials_and_names_the_failed_ones(capsys: pytest.CaptureFixture[str]) -> None:
    result = Result()
    assert result.trial("first", []) and not result.trial("second", ["a", "b"])
    assert (result.tried, result.survived, result.failures) == (2, 1, ["second: a; b"])
    assert capsys.readouterr().err == "FAILED second: a; b\n"


@pytest.mark.parametrize(("failures", "code"), [([], 0), (["one: broken"], 1)])
def test_the_command_prints_the_counts_and_fails_with_a_campaign(
    failures: list[str], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("tests.campaign.soak.run", lambda minutes, seed: Result(3, 3 - len(failures), failures))
    assert main(["soak", "--minutes", "1", "--seed", "4", "--json", str(tmp_path / "r.json")]) == code
    assert "soak              3" in capsys.readouterr().out
    facts = json.loads((tmp_path / "r.json").read_text())
    assert facts["seed"] == 4 and facts["campaigns"]["soak"]["failures"] == failures


def test_an_unknown_campaign_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["sok"])
    assert f"choose from {', '.join(CAMPAIGNS)}" in capsys.readouterr().err


def test_half_written_files_are_found_unless_they_are_temporary(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("{}")
    before = lasting_state(tmp_path)
    (tmp_path / ".b.json.1-2-3.partial").write_text("{")
    (tmp_path / ".c.partial").mkdir()
    (tmp_path / ".c.partial" / "d.json").write_text("{")
    assert half_written(tmp_path) == [] and lasting_state(tmp_path) == before
    assert is_temporary(Path(".c.partial/d.json")) and not is_temporary(Path("a.partial"))
    (tmp_path / "e.json").write_text("{")
    (found,) = half_written(tmp_path)
    assert found.startswith("e.json is not whole") and lasting_state(tmp_path) != before


def test_growth_after_the_warm_up_is_found() -> None:
    flat = [[n, 50_000, 9, 4] for n in range(9)]
    assert _growth([[0, 10_000, 5, 2], *flat[1:]]) == []
    assert _growth([*flat, [9, 60_000, 10, 4]]) == [
        "resident memory grew from 50000 to 60000",
        "open files grew from 9 to 10",
    ]


@NEEDS_CC
def test_faults_happen_at_the_chosen_write_and_leave_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["sample", str(TINY), "--engine", "onnxruntime", "--no-cache", "-n", "1", "--out", str(out / "x.png")]
    with Worker() as worker:
        assert worker.run(words).code == 0
        whole = (out / "x.png").read_bytes()
        for point in (2, 4):
            shutil.rmtree(out)
            assert worker.run(words, fault="kill_after", at=point).signal == signal.SIGKILL
            assert half_written(tmp_path) == []
            assert worker.run(words, fault="full_disk", at=point).problems(2) == []
            assert worker.run(words).code == 0 and (out / "x.png").read_bytes() == whole
            assert [path.name for path in out.iterdir()] == ["x.png"]


@pytest.mark.slow
@NEEDS_CC
@pytest.mark.parametrize("name", ["kill", "disk", "soak", "parallel", "platform"])
def test_a_short_campaign_finds_nothing(name: str) -> None:
    assert main([name, "--minutes", "0.1"]) == 0
