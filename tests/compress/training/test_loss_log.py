"""compress/training/loss_log.py: the losses of a killed and resumed training are those of an undisturbed one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from diffpress.compress.training.loop import Training, train
from diffpress.compress.training.loss_log import LOSSES, LossLog, read_losses
from tests.compress.training.test_loop import OBJECTIVE, KilledError, killed_at, student


def training(folder: Path) -> Training:
    return Training(10, 0.05, 3, 0.9, 1, 3, folder / "work", "distill", logs=folder / "logs")


@pytest.mark.parametrize("step", [2, 3, 7])
def test_a_resumed_training_leaves_the_same_losses(step: int, tmp_path: Path) -> None:
    train(student(), OBJECTIVE, training(tmp_path / "whole"))
    killed = training(tmp_path / "killed")
    with pytest.raises(KilledError):
        train(student(), killed_at(step), killed)
    train(student(), OBJECTIVE, killed)
    whole, resumed = (tmp_path / name / "logs" / LOSSES for name in ("whole", "killed"))
    assert [row[0] for row in read_losses(whole)] == list(range(1, 11))
    assert whole.read_bytes() == resumed.read_bytes()


def test_without_a_folder_nothing_is_written(tmp_path: Path) -> None:
    train(student(), OBJECTIVE, replace(training(tmp_path), logs=None))
    assert not list(tmp_path.rglob(LOSSES))


@pytest.mark.parametrize("text", ["", "step,loss\n1,nothing\n", "a\n\x00\n", "step,loss\n1\n"])
def test_a_damaged_log_is_no_log_and_stops_nothing(text: str, tmp_path: Path) -> None:
    (tmp_path / LOSSES).write_text(text)
    assert read_losses(tmp_path / LOSSES) == []
    log = LossLog(tmp_path, 0)
    log.add(1, 0.5)
    log.write()
    assert read_losses(tmp_path / LOSSES) == [(1, 0.5)]


def test_losses_after_the_step_that_a_training_resumes_from_are_dropped(tmp_path: Path) -> None:
    for start, steps in ((0, range(1, 7)), (3, range(4, 6))):  # killed after its log was written, and before its state
        log = LossLog(tmp_path, start)
        for step in steps:
            log.add(step, float(step))
        log.write()
    assert [step for step, _ in read_losses(tmp_path / LOSSES)] == [1, 2, 3, 4, 5]
