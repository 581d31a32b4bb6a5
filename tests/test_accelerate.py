"""`accelerate launch` with two CPU processes: averaged gradients, one writer, one error."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from safetensors.torch import load_file  # noqa: E402

from diffpress.compress.sources.load import load_checkpoint  # noqa: E402
from diffpress.compress.training.loop import step_generator, train  # noqa: E402
from diffpress.runtime.bundle import load_bundle  # noqa: E402
from tests.together import ACCUMULATE, SEED, TwoLayers, drawing_late, loss_on, run_in, together  # noqa: E402

if TYPE_CHECKING:
    from torch import Generator, Tensor
    from torch.nn import Module

ROOT = Path(__file__).parents[1]
LAUNCH = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--main_process_port", "0", "-m")

RECIPE = ROOT / "examples" / "distill_sd.yaml"
SMALL = (
    *("teacher_samples=4", "quantize.samples=1"),
    *("stages.0.distill.steps=2", "stages.0.distill.batch=2", "stages.1.distill.steps=2", "stages.1.distill.batch=2"),
    *("stages.1.distill.trajectories=4", "stages.1.distill.trajectory_steps=4"),
)


def launched(*words: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a module in two processes."""
    offline = {"HF_HUB_OFFLINE": "1", "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *LAUNCH, *map(str, words)]
    return subprocess.run(command, cwd=ROOT, env=os.environ | offline, capture_output=True, text=True, timeout=900)


def weights_of(folder: Path) -> list[dict[str, Tensor]]:
    """Return the weights of both processes after a training in `folder`."""
    return [load_file(folder / f"process-{i}.safetensors") for i in range(2)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Folders of an uninterrupted training and of one that was killed and resumed."""
    uninterrupted, killed = (tmp_path_factory.mktemp(name) for name in ("uninterrupted", "killed"))
    done = launched("tests.together", "try", "kill", killed)
    assert done.returncode != 0 and [path.name for path in killed.iterdir()] == ["work"]
    done = launched("tests.together", "try", "train", uninterrupted, killed)
    assert done.returncode == 0, done.stderr
    return uninterrupted, killed


def trained_on_the_mean_of(batches: int, folder: Path) -> dict[str, Tensor]:
    """Return the weights after a training in one process whose steps have the mean loss of several batches."""
    steps = itertools.count()

    def mean_loss(model: Module, which: int, generator: Generator, share: float) -> Tensor:
        first = batches * next(steps)
        losses = [loss_on(model, which, step_generator(SEED, first + i)) for i in range(batches)]
        return torch.stack(losses).mean()

    return train(TwoLayers(), drawing_late(mean_loss), run_in(folder)).state_dict()


def test_gradients_are_averaged_over_processes(trained: tuple[Path, Path], tmp_path: Path) -> None:
    one, other = weights_of(trained[0])
    expected = trained_on_the_mean_of(2, tmp_path / "both")
    alone = train(TwoLayers(), drawing_late(together), run_in(tmp_path / "alone")).state_dict()
    for name in expected:
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], expected[name], atol=1e-6, rtol=1e-5)
    assert not torch.allclose(one["a.weight"], alone["a.weight"], atol=1e-3)


def test_gradients_are_averaged_over_the_batches_of_a_step_and_over_processes(tmp_path: Path) -> None:
    done = launched("tests.together", "try", "accumulate", tmp_path)
    assert done.returncode == 0, done.stderr
    one, other = weights_of(tmp_path)
    expected = trained_on_the_mean_of(2 * ACCUMULATE, tmp_path / "all")
    for name in expected:
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], expected[name], atol=1e-6, rtol=1e-5)


def test_a_killed_training_ends_like_an_uninterrupted_one(trained: tuple[Path, Path]) -> None:
    uninterrupted, killed = map(weights_of, trained)
    for found, expected in zip(killed, uninterrupted, strict=True):
        assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("refuse", "0"), "bad input of process 0"),
        # only this process fails: it waits for the launcher in vain, then exits
        (("refuse", "1", "1"), "bad input of process 1"),
        (("diverge", "."), "distill test: the loss is nan at step 7 of 12"),
    ],
)
def test_a_failure_in_one_process_ends_both_with_one_line_and_code_2(
    words: tuple[str, ...], line: str, tmp_path: Path
) -> None:
    done = launched("tests.together", "try", *(tmp_path if word == "." else word for word in words))
    error_lines = [entry for entry in done.stderr.splitlines() if entry.startswith("diffpress: ")]
    assert len(error_lines) == 1 and line in error_lines[0], done.stderr
    # the launcher ends with its own traceback, which names the exit code of the first failure
    assert done.stderr.count("Traceback") == 1 and "ChildFailedError" in done.stderr
    assert re.search(r"exitcode\s*: 2\b", done.stderr)
    assert done.stdout.splitlines() == ["  here"]


def test_both_processes_run_the_stages_of_a_recipe_and_one_writes(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    done = launched("tests.together", "try", "stages", tiny_folder("sd"), RECIPE, tmp_path, *SMALL)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line for line in lines if line[0] == "["] == ["[1/3] distill", "[2/3] distill", "[3/3] quantize"]
    assert sum(line.startswith("  distill trajectory: 2/2") for line in lines) == 1
    stages = sorted((tmp_path / "stages").iterdir())
    kept = [re.sub("[0-9a-f]{12,16}", "", path.name) for path in stages]
    assert kept == ["00-distill-", "01-distill-", "02-quantize-", *["paths-.npy"] * 2]  # and no other files
    student = load_checkpoint(stages[2])
    assert student.quantization is not None
    assert [record.changed.get("processes") for record in student.history] == [2, 2, None]
    assert [record.changed.get("guidance") for record in student.history] == [7.5, 7.5, None]


@pytest.mark.slow
def test_two_processes_distill_a_stable_diffusion_into_one_bundle(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    settings = (word for setting in SMALL for word in ("--set", setting))
    words: list[str | Path] = ["--recipe", RECIPE, *settings, "--out", tmp_path / "out"]
    done = launched("diffpress", "compress", tiny_folder("sd"), *words)
    assert done.returncode == 0, done.stderr
    plan = load_bundle(tmp_path / "out" / "bundle").spec.plan
    assert (plan.solver, plan.steps, plan.guidance) == ("euler", 4, 1.0)
    assert [line for line in done.stdout.splitlines() if line.startswith("[export]")] == ["[export]"]
