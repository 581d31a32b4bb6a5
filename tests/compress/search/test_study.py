"""compress/search/study.py: a killed and resumed study proposes what an undisturbed one does."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from diffpress.compress.search.run import run_search
from diffpress.compress.search.settings import Bounds
from diffpress.compress.search.space import Params, Space, starting_points
from diffpress.compress.search.study import OBJECTIVES, Result, Study

ROOT = Path(__file__).parents[3]
SPACE = Space(("none", "diff_pruning", "magnitude"), (), ("none", "trajectory"), (4, 5, 8), False, 90)
TRIALS = 14  # more than the sampler's random ones


def objective(params: Params, done: object = ()) -> Result:
    """A fake of a trial: fewer steps and MACs are faster and worse; one combination cannot be run."""
    if params["prune"] == "magnitude" and params["format"] == "w4a8":
        return Result(failure="cannot be run")
    steps, macs = params.get("steps", 2), params.get("macs", 1.0)
    latency, size = steps * macs / 20.0, {"int8": 3.5, "w4a8": 1.8, "fp16": 7.0}[params["format"]] * macs
    error = -3.0 * steps * macs - (0.0 if params["format"] == "w4a8" else 4.0)
    ratio = 1.0 + 10 ** (error / 10.0)
    excesses = Bounds(max_latency_ratio=0.2, max_size_mib=4.0).excesses(latency, None, size)
    return Result(latency, size, (error,), None, ratio, ratio, excesses)


def proposals(file: Path, count: int, seed: int = 3) -> list[Params]:
    return [trial.params for trial in run_search(Study(file, SPACE, seed), objective, count, None)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> list[Params]:
    return proposals(tmp_path_factory.mktemp("whole") / "study.journal", TRIALS)


@pytest.mark.parametrize("stops", [(5,), (12, 13)])
def test_a_study_that_is_opened_again_proposes_the_same_trials(
    tmp_path: Path, undisturbed: list[Params], stops: tuple[int, ...]
) -> None:
    for stop in (*stops, TRIALS):
        found = proposals(tmp_path / "study.journal", stop)
    assert found == undisturbed


def test_a_study_that_is_killed_in_a_trial_proposes_that_trial_again(tmp_path: Path, undisturbed: list[Params]) -> None:
    code = (
        "import os, signal, sys\nfrom pathlib import Path\n"
        "from tests.compress.search.test_study import SPACE, Study, objective, run_search\n"
        "def trial(params, done):\n"
        "    if len(done) == 11: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return objective(params)\n"
        "run_search(Study(Path(sys.argv[1]), SPACE, 3), trial, 14, None)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, str(tmp_path / "study.journal")], cwd=ROOT, check=False)
    assert killed.returncode == -9
    assert len(Study(tmp_path / "study.journal", SPACE, 3).trials) == 11
    assert proposals(tmp_path / "study.journal", TRIALS) == undisturbed


def test_another_seed_proposes_other_trials_after_the_starting_points(
    tmp_path: Path, undisturbed: list[Params]
) -> None:
    points = starting_points(SPACE)
    assert undisturbed[: len(points)] == points
    other = proposals(tmp_path / "study.journal", len(points) + 4, seed=4)
    assert other[: len(points)] == points and other[len(points) :] != undisturbed[len(points) : len(points) + 4]


def test_no_trial_repeats_an_earlier_one(undisturbed: list[Params]) -> None:
    assert len({str(params) for params in undisturbed}) == TRIALS


def test_what_is_stored_of_a_trial_is_read_back_as_it_was(tmp_path: Path) -> None:
    trials = run_search(Study(tmp_path / "s.journal", SPACE, 0), objective, 6, None)
    again = Study(tmp_path / "s.journal", SPACE, 0).trials
    assert again == trials and [trial.number for trial in again] == list(range(6))
    assert all(trial.result == objective(trial.params) for trial in again if not trial.result.failure)


def test_time_limits_the_trials(tmp_path: Path) -> None:
    study = Study(tmp_path / "s.journal", SPACE, 0)
    for params in starting_points(SPACE)[:2]:
        study.add(params, Result(0.1, 1.0, (-9.0,), None, 1.0, 1.0, {}, seconds=30.0))
    assert len(run_search(study, objective, None, 60.0)) == 2
    assert len(OBJECTIVES) == 3
