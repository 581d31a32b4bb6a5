"""compress/workspace.py: the folder of a run is laid out in one place, and stages do not know it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.pipeline import run_stages
from diffpress.compress.recipe import Recipe
from diffpress.compress.workspace import Workspace, reserved
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
CODE = {file: file.read_text() for file in (ROOT / "diffpress").rglob("*.py") if file.name != "workspace.py"}


def test_no_other_file_names_a_folder_or_file_of_a_run() -> None:
    run = Workspace(Path("out"))
    names = [path.name for path in vars(Workspace).values() if isinstance(path, property) for path in [path.fget(run)]]  # type: ignore[misc]
    assert len(CODE) > 100 and {"stages", "recipe.json", "bundle", "report.html", "comparison.png"} <= set(names)
    pattern = re.compile("|".join(rf'"{re.escape(n)}"' if "." in n else rf'(?:out|root|work) / "{n}"' for n in names))
    assert {str(file): found for file, text in CODE.items() if (found := pattern.findall(text))} == {}


def test_the_work_and_the_logs_of_a_stage_belong_to_its_folder() -> None:
    run = Workspace(Path("out"))
    folder = run.stage(2, "distill", "0123456789abcdef")
    assert folder == Path("out/stages/02-distill-0123456789ab")
    assert run.work(folder) == Path("out/stages/.02-distill-0123456789ab.work")
    assert run.logs(folder) == Path("out/logs/02-distill-0123456789ab")


def test_training_without_data_writes_shared_samples_and_previews_into_the_workspace(
    unet: Checkpoint, tmp_path: Path
) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(
        "stages: [{prune: {method: magnitude, ratio: 0.5, round_to: 4}}, "
        "{distill: {steps: 2, batch: 2, samples: 4, preview_every: 1}}]"
    )
    run = Workspace(tmp_path / "out")
    run_stages(unet, Recipe.load(file), run.root)
    samples = [path.name for path in run.stages.iterdir() if path.is_file()]
    assert len(samples) == 1 and samples[0].startswith("paths-")
    (stage,) = run.stages.glob("01-distill-*")
    assert [path.name for path in sorted(run.logs(stage).iterdir())] == [
        "losses.csv",
        "step-000001.png",
        "step-000002.png",
    ]
    assert not run.work(stage).exists()


def test_a_folder_is_reserved_for_one_process_at_a_time_and_cleaned_of_what_a_killed_run_left(tmp_path: Path) -> None:
    run = Workspace(tmp_path / "out")
    with reserved(run.root):
        assert run.lock.is_file()
        with pytest.raises(InvalidInputError, match="out: another command is writing here"):
            reserved(run.root).__enter__()
        run.recipe.write_text("{}")
    (run.root / ".bundle.partial").mkdir()
    run.work(run.stage(0, "prune", "abc")).mkdir(parents=True)
    with reserved(run.root):
        assert not (run.root / ".bundle.partial").exists() and run.work(run.stage(0, "prune", "abc")).is_dir()
    assert not run.lock.exists()


def test_the_files_of_a_folder_that_is_no_run_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / ".mine.partial").touch()
    with reserved(tmp_path):
        pass
    assert [path.name for path in tmp_path.iterdir()] == [".mine.partial"]
    with pytest.raises(InvalidInputError, match="exists and is not a folder of diffpress; choose another --out"):
        reserved(tmp_path / ".mine.partial").__enter__()
