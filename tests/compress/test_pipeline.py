"""compress/pipeline.py: finished stages are reused, changed stages rerun, and a killed run resumes."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from diffpress.compress import stages
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.pipeline import check_start, claim_folder, load_teacher, run_stages
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.stages import StageDef
from diffpress.runtime.errors import InvalidInputError

ROOT = Path(__file__).parents[2]
STAGES = """
  - schedule: {solver: ddim, steps: 3}
  - prune: {method: magnitude, ratio: 0.4, round_to: 4}
  - distill: {steps: 12, batch: 4, save_every: 5}
"""


@pytest.fixture
def teacher(unet: Checkpoint, tmp_path: Path) -> Checkpoint:
    save_checkpoint(unet, tmp_path / "teacher")
    return load_checkpoint(tmp_path / "teacher")


@pytest.fixture
def recipe(npz: Path) -> Callable[..., Recipe]:
    """Write a recipe file with the given stages and read it."""

    def make(stages: str = STAGES, *overrides: str) -> Recipe:
        file = npz.with_name("r.yaml")
        file.write_text(f"seed: 2\ndata: {npz.name}\nstages: {stages}\n")
        return Recipe.load(file, overrides)

    return make


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the stage functions that are called during the test."""
    names: list[str] = []

    def recorded(stage: StageDef) -> StageDef:
        def call(checkpoint: Checkpoint, config: Any, context: Context) -> Checkpoint:
            names.append(stage.name)
            return stage.run(checkpoint, config, context)

        return replace(stage, run=call)

    for name, stage in list(stages.STAGES.items()):
        monkeypatch.setitem(stages.STAGES, name, recorded(stage))
    return names


def files(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


# --- stages ----------------------------------------------------------------------------------------------------


def test_a_run_saves_every_stage_and_its_history(
    teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    result = run_stages(teacher, recipe(), out)
    names = sorted(path.name for path in (out / "stages").iterdir())
    assert [name[:-13] for name in names] == ["00-schedule", "01-prune", "02-distill"]  # no leftovers
    assert [record.stage for record in result.history] == ["schedule", "prune", "distill"]
    first, second, last = result.history
    assert (first.before, first.after, second.after) == (teacher.hash, second.before, last.before)
    assert last.after == result.hash == load_checkpoint(out / "stages" / names[2]).hash
    assert last.seed == 2 and last.config["steps"] == 12 and first.changed["plan"] == ["ddim-4", "ddim-3"]
    before, after = second.changed["parameters"]
    assert after < before and second.changed["macs"][1] < second.changed["macs"][0]


def test_the_sqnr_to_the_teacher_is_maximal_until_the_network_changes(
    teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    history = run_stages(teacher, recipe(), tmp_path / "out").history
    sqnr_db = [record.changed["teacher_sqnr_db"] for record in history]
    assert sqnr_db[0] == 200.0 and sqnr_db[1] < sqnr_db[2] < 100.0


def test_a_second_run_reuses_every_stage(
    teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], tmp_path: Path
) -> None:
    one = run_stages(teacher, recipe(), tmp_path / "out")
    assert called == ["schedule", "prune", "distill"]
    before = files(tmp_path / "out")
    two = run_stages(teacher, recipe(), tmp_path / "out")
    assert called == ["schedule", "prune", "distill"] and two.hash == one.hash and two.history == one.history
    assert files(tmp_path / "out") == before


def test_changing_a_later_stage_reruns_only_that_stage(
    teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], tmp_path: Path
) -> None:
    run_stages(teacher, recipe(), tmp_path / "out")
    called.clear()
    run_stages(teacher, recipe(STAGES, "stages.distill.steps=3"), tmp_path / "out")
    assert called == ["distill"]


def test_changing_an_earlier_stage_reruns_the_stages_after_it(
    teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], tmp_path: Path
) -> None:
    run_stages(teacher, recipe(), tmp_path / "out")
    called.clear()
    run_stages(teacher, recipe(STAGES, "stages.prune.ratio=0.6"), tmp_path / "out")
    assert called == ["prune", "distill"]


@pytest.mark.parametrize("change", ["seed", "data"])
def test_another_seed_or_other_images_rerun_everything(
    change: str, teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], npz: Path, tmp_path: Path
) -> None:
    import numpy as np

    run_stages(teacher, recipe("[schedule]"), tmp_path / "out")
    overrides = ["seed=3"] if change == "seed" else []
    if change == "data":
        with np.load(npz) as stored:
            np.savez(npz, x=255 - stored["x"], y=stored["y"])
    run_stages(teacher, recipe("[schedule]", *overrides), tmp_path / "out")
    assert called == ["schedule", "schedule"]


def test_the_order_of_the_same_stages_matters(
    teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    stages = ["  - schedule: {solver: ddim, steps: 3}\n", "  - prune: {method: magnitude, ratio: 0.4, round_to: 4}\n"]
    hashes = [run_stages(teacher, recipe("\n" + "".join(s)), tmp_path / "out").hash for s in (stages, stages[::-1])]
    assert hashes[0] == hashes[1]  # these two stages commute, but each order was run
    assert len(list((tmp_path / "out" / "stages").iterdir())) == 4


def test_a_custom_module_runs_through_all_stages_and_is_reused(
    custom_files: Callable[..., tuple[Path, Path]], recipe: Callable[..., Recipe], called: list[str], tmp_path: Path
) -> None:
    file, weights = custom_files("v")
    teacher = load_checkpoint(f"{file}:{weights}")
    text = STAGES + "  - quantize: {samples: 2, batch: 2}\n"
    one = run_stages(teacher, recipe(text), tmp_path / "out")
    assert called == ["schedule", "prune", "distill", "quantize"] and one.quantization is not None
    assert run_stages(teacher, recipe(text), tmp_path / "out").hash == one.hash and len(called) == 4


def test_images_that_do_not_match_the_model_are_refused_before_any_stage(
    teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], npz: Path, tmp_path: Path
) -> None:
    import numpy as np

    cases: dict[str, dict[str, Any]] = {
        "images are": {"x": np.zeros((5, 9, 9), np.uint8), "y": np.zeros(5)},
        "no labels": {"x": np.zeros((5, 8, 8), np.uint8)},
        "labels reach 3": {"x": np.zeros((5, 8, 8), np.uint8), "y": np.full(5, 3)},
        "expected either 'x'": {"y": np.zeros(5)},
        "'images' is float64": {"images": np.zeros(3)},
        "float64": {"x": np.zeros((5, 8, 8)), "y": np.zeros(5)},
        "no images": {"x": np.zeros((0, 8, 8), np.uint8), "y": np.zeros(0)},
        "'y' is float64": {"x": np.zeros((5, 8, 8), np.uint8), "y": np.zeros(4)},
    }
    for message, arrays in cases.items():
        np.savez(npz, **arrays)
        with pytest.raises(InvalidInputError, match=f"images.npz: .*{message}"):
            run_stages(teacher, recipe(), tmp_path / "out")
    for content in (b"PK\x03\x04 cut off", b"", b"text"):
        npz.write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"images.npz: not readable"):
            run_stages(teacher, recipe(), tmp_path / "out")
    assert called == []


# --- the output folder -----------------------------------------------------------------------------------------


def test_a_new_or_empty_folder_is_accepted(teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("empty", "new/deeper"):
        claim_folder(tmp_path / name, teacher, recipe(), update=False)
        found = json.loads((tmp_path / name / "recipe.json").read_text())
        inputs = json.loads((tmp_path / name / "inputs.json").read_text())
        assert found["seed"] == 2 and inputs["teacher"] == teacher.hash


def test_the_same_recipe_may_run_again(teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)


def test_a_recipe_is_the_same_when_named_from_another_folder(
    teacher: Checkpoint, recipe: Callable[..., Recipe], npz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    monkeypatch.chdir(tmp_path)
    claim_folder(tmp_path / "out", teacher, Recipe.load(Path("r.yaml")), update=False)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("seed=3", r"seed: 2 there, 3 here"),
        ("stages.prune.ratio=0.5", r"stages\[1\]\.prune\.ratio: 0\.4 there, 0\.5 here"),
        ("export.targets=[onnx, openvino]", r"export\.targets: "),
    ],
)
def test_another_recipe_is_refused_with_the_first_difference_and_nothing_changes(
    override: str, difference: str, teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    before = files(tmp_path / "out")
    with pytest.raises(InvalidInputError, match=rf"out: was made by another recipe \({difference}.*--update"):
        claim_folder(tmp_path / "out", teacher, recipe(STAGES, override), update=False)
    assert files(tmp_path / "out") == before
    claim_folder(tmp_path / "out", teacher, recipe(STAGES, override), update=True)
    assert files(tmp_path / "out") != before


def test_an_additional_stage_makes_another_recipe(
    teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    with pytest.raises(InvalidInputError, match=r"another recipe \(stages: "):
        claim_folder(tmp_path / "out", teacher, recipe(STAGES + "  - quantize\n"), update=False)


def test_another_teacher_is_refused(
    teacher: Checkpoint, plain: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    with pytest.raises(InvalidInputError, match=r"another recipe \(teacher: "):
        claim_folder(tmp_path / "out", plain, recipe(), update=False)


@pytest.mark.parametrize("update", [False, True])
def test_a_folder_with_other_content_is_refused_and_unchanged(
    update: bool, teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(InvalidInputError, match=f"{name}: exists and is not a folder of diffpress"):
            claim_folder(tmp_path / name, teacher, recipe(), update)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.txt"]


def test_a_broken_recipe_json_is_refused(teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "recipe.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"recipe.json: not readable"):
        claim_folder(tmp_path / "out", teacher, recipe(), update=False)


def test_a_read_only_folder_is_refused_before_any_stage(
    teacher: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr("os.replace", refuse)
    with pytest.raises(InvalidInputError, match=r"recipe.json: cannot be written .*Read-only"):
        claim_folder(tmp_path / "out", teacher, recipe(), update=False)
    assert not (tmp_path / "out" / "recipe.json").exists()


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_leaves_no_partial_stage_and_the_run_resumes_later(
    failure: Exception,
    teacher: Checkpoint,
    recipe: Callable[..., Recipe],
    called: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, saved = tmp_path / "out", []

    def full(tensors: dict[str, torch.Tensor], path: Path, *args: Any, **kwargs: Any) -> None:
        saved.append(path)
        if len(saved) == 2:
            raise failure
        save_file(tensors, path, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr("diffpress.compress.checkpoint.save_file", full)
        with pytest.raises(InvalidInputError, match=r"01-prune.*cannot be written .*No space left"):
            run_stages(teacher, recipe(), out)
    assert [path.name[:11] for path in (out / "stages").iterdir()] == ["00-schedule"]
    called.clear()
    run_stages(teacher, recipe(), out)
    assert called == ["prune", "distill"]


# --- killed ----------------------------------------------------------------------------------------------------


PROGRAM = """
import sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from diffpress.compress.training import loop
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.pipeline import run_stages
from diffpress.compress.recipe import Recipe
save = loop._save
def save_and_wait(model, optimizer, ema, step, run):  # so that the kill happens during the stage
    save(model, optimizer, ema, step, run)
    if step == 10:
        time.sleep(120)
loop._save = save_and_wait
run_stages(load_checkpoint(sys.argv[1]), Recipe.load(Path(sys.argv[2])), Path(sys.argv[3]))
"""


def test_a_run_killed_during_distill_resumes_to_the_same_result(
    teacher: Checkpoint, recipe: Callable[..., Recipe], called: list[str], npz: Path, tmp_path: Path
) -> None:
    settings = recipe(STAGES, "stages.distill.steps=12")
    out = tmp_path / "out"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(tmp_path / "teacher"), str(npz.with_name("r.yaml")), str(out)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    uninterrupted = run_stages(teacher, settings, tmp_path / "uninterrupted")
    try:
        for _ in range(1200):
            work = list((out / "stages").glob(".02-distill-*.work/training.safetensors")) if out.exists() else []
            if work and saved_step(work[0]) == "10":
                break
            assert process.poll() is None, process.stderr.read().decode()
            time.sleep(0.1)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    process.stderr.close()
    assert process.returncode == -signal.SIGKILL
    called.clear()
    assert run_stages(teacher, settings, out).hash == uninterrupted.hash
    assert called == ["distill"]
    names = [
        sorted(path.name for path in (folder / "stages").iterdir()) for folder in (out, tmp_path / "uninterrupted")
    ]
    assert names[0] == names[1] and len(names[0]) == 3  # the killed run left nothing behind


def saved_step(file: Path) -> str:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as opened:
        return opened.metadata()["step"]


# --- a student and its teacher -----------------------------------------------------------------------------------


@pytest.fixture
def student(unet: Checkpoint, pruned: Checkpoint, tmp_path: Path) -> Checkpoint:
    save_checkpoint(unet, tmp_path / "teacher")
    save_checkpoint(pruned, tmp_path / "student")
    return load_checkpoint(tmp_path / "student")


def test_stages_of_a_student_learn_from_its_teacher(
    student: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    teachers: list[str] = []
    distill = stages.STAGES["distill"]

    def run(checkpoint: Checkpoint, config: Any, context: Context) -> Checkpoint:
        teachers.append(context.teacher.hash)
        return distill.run(checkpoint, config, context)

    monkeypatch.setitem(stages.STAGES, "distill", replace(distill, run=run))
    settings = recipe("[{distill: {steps: 2, batch: 4}}]", "teacher=teacher")
    teacher = load_teacher(student, settings)
    result = run_stages(student, settings, tmp_path / "out", teacher=teacher)
    assert teachers == [load_checkpoint(tmp_path / "teacher").hash] and student.hash != teachers[0]
    assert result.history[-1].before == student.hash
    # again: the finished stage is read
    assert run_stages(student, settings, tmp_path / "out", teacher=teacher).hash == result.hash and len(teachers) == 1


def test_a_folder_is_of_one_student_and_one_teacher(
    student: Checkpoint, unet: Checkpoint, recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings = recipe("[schedule]", "teacher=teacher")
    claim_folder(tmp_path / "out", student, settings, False, unet)
    claim_folder(tmp_path / "out", student, settings, False, unet)
    for checkpoint, teacher, name in ((unet, unet, "checkpoint"), (student, student, "teacher")):
        with pytest.raises(InvalidInputError, match=rf"made by another recipe \({name}: "):
            claim_folder(tmp_path / "out", checkpoint, settings, False, teacher)


def test_a_teacher_of_other_samples_or_inputs_is_refused(
    student: Checkpoint, unet_with: Callable[..., Checkpoint], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    settings, same = recipe("[schedule]", "teacher=teacher"), unet_with(classes=4)
    for other, words in (
        (
            unet_with(),
            r"another conditioning than .* in the checkpoint, .* in the teacher",
        ),
        (unet_with(classes=5), r"another conditioning .*classes: 3 in the checkpoint, 4 in the teacher"),
        (same.evolve(spec=replace(same.spec, sample_shape=(1, 16, 16))), "another sample shape"),
        (same.evolve(spec=replace(same.spec, data_range=(0.0, 1.0))), "another data range"),
    ):
        shutil.rmtree(tmp_path / "teacher")
        save_checkpoint(other, tmp_path / "teacher")
        with pytest.raises(InvalidInputError, match=words):
            load_teacher(student, settings)


def test_outputs_of_different_prediction_types_are_not_compared(
    student: Checkpoint, unet_with: Callable[..., Checkpoint], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "teacher")
    save_checkpoint(unet_with(classes=4, prediction="epsilon"), tmp_path / "teacher")
    for kind in ("recover", "guidance", "score"):
        settings = recipe(f"[{{distill: {{kind: {kind}, steps: 1, batch: 4}}}}]", "teacher=teacher")
        with pytest.raises(InvalidInputError, match=f"{kind}.*: the teacher predicts epsilon, the student v"):
            run_stages(student, settings, tmp_path / "out")
    settings = recipe("[{distill: {kind: trajectory, steps: 1, trajectories: 4, batch: 4}}]", "teacher=teacher")
    assert run_stages(student, settings, tmp_path / "out").spec.distilled == "trajectory"


def test_a_student_without_a_block_of_the_teacher_is_recovered_by_its_outputs_alone(
    unet_with: Callable[..., Checkpoint], recipe: Callable[..., Recipe], tmp_path: Path
) -> None:
    save_checkpoint(unet_with(classes=4), tmp_path / "teacher")
    smaller = unet_with(
        classes=4, block_out_channels=[16], down_block_types=["DownBlock2D"], up_block_types=["UpBlock2D"]
    )
    settings = "[{distill: {steps: 1, batch: 4%s}}]"
    with pytest.raises(InvalidInputError, match=r"has no block .* set feature_weight: 0"):
        run_stages(smaller, recipe(settings % "", "teacher=teacher"), tmp_path / "out")
    without = recipe(settings % ", feature_weight: 0", "teacher=teacher")
    assert run_stages(smaller, without, tmp_path / "out").history[-1].stage == "distill"


def test_what_a_checkpoint_has_gone_through_limits_its_first_stage(
    unet: Checkpoint, quantized: Checkpoint, recipe: Callable[..., Recipe]
) -> None:
    distilled = unet.evolve(spec=replace(unet.spec, distilled="trajectory"))
    for checkpoint, stage, words in (
        (quantized, "prune", "prune cannot come after quantize"),
        (quantized, "quantize", "a model is quantized once"),
        (distilled, "prune", r"prune cannot come after distill: \{kind: trajectory\}"),
        (distilled, "schedule", "schedule cannot come after distill"),
    ):
        with pytest.raises(InvalidInputError, match=words):
            check_start(checkpoint, recipe(f"[{stage}]"), "r.yaml")
    check_start(distilled, recipe("[quantize]"), "r.yaml")
    check_start(unet, recipe(), "r.yaml")
