"""compress/training/loop.py: AdamW with an EMA, bit-identical resuming, non-finite losses."""

from __future__ import annotations

import copy
import errno
import itertools
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import nn

from diffpress.compress.training.loop import (
    GRADIENT_CLIP,
    Objective,
    Training,
    TrainingDivergedError,
    learning_rate_factor,
    step_generator,
    train,
)
from diffpress.runtime.errors import InvalidInputError


@pytest.fixture
def run(tmp_path: Path) -> Training:
    return Training(
        steps=10,
        learning_rate=0.05,
        warmup=3,
        ema=0.9,
        seed=1,
        save_every=3,
        work=tmp_path / "work",
        what="distill recover",
    )


def student() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def draw(generator: torch.Generator, share: float = 0.0) -> tuple[torch.Tensor]:
    return (torch.randn(16, 4, generator=generator),)


def loss_of(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return ((model(x) - x[:, :2] * 3.0) ** 2).mean()


OBJECTIVE = Objective(draw, loss_of)


def counting(done: list[int]) -> Objective:
    def counted_draw(generator: torch.Generator, share: float) -> tuple[torch.Tensor]:
        done.append(1)
        return draw(generator)

    return Objective(counted_draw, loss_of)


class KilledError(Exception):
    pass


def killed_at(step: int) -> Objective:
    """Return the objective of a run that is killed after `step` steps."""
    step_numbers = iter(range(10_000))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        if next(step_numbers) == step:
            raise KilledError
        return loss_of(model, x)

    return Objective(draw, loss)


def states_equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(a.state_dict()[name], b.state_dict()[name]) for name in a.state_dict())


def held_out_loss(model: nn.Module) -> float:
    with torch.no_grad():
        return loss_of(model, *draw(torch.Generator().manual_seed(99))).item()


def test_the_loss_falls(run: Training) -> None:
    trained = train(student(), OBJECTIVE, replace(run, steps=150))
    assert held_out_loss(trained) < 0.5 * held_out_loss(student()) and not trained.training


@pytest.mark.parametrize("step", [0, 2, 3, 5, 9])
def test_a_killed_run_ends_bit_identical_to_an_uninterrupted_one(step: int, run: Training, tmp_path: Path) -> None:
    uninterrupted = train(student(), OBJECTIVE, replace(run, work=tmp_path / "other"))
    with pytest.raises(KilledError):
        train(student(), killed_at(step), run)
    assert states_equal(train(student(), OBJECTIVE, run), uninterrupted)


def test_a_killed_run_resumes_from_its_last_save(run: Training) -> None:
    with pytest.raises(KilledError):
        train(student(), killed_at(8), run)
    done: list[int] = []
    train(student(), counting(done), run)
    assert len(done) == 10 - 6


class Dropout(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = student(), nn.Dropout(0.3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.net(self.drop(x))


def test_a_network_with_dropout_resumes_bit_identically(run: Training, tmp_path: Path) -> None:
    uninterrupted = train(Dropout(), OBJECTIVE, replace(run, work=tmp_path / "other"))
    with pytest.raises(KilledError):
        train(Dropout(), killed_at(5), run)
    assert states_equal(train(Dropout(), OBJECTIVE, run), uninterrupted)


def test_the_state_of_a_run_with_other_settings_is_ignored(run: Training, tmp_path: Path) -> None:
    with pytest.raises(KilledError):
        train(student(), killed_at(8), run)
    changed = replace(run, learning_rate=0.01)
    fresh = train(student(), OBJECTIVE, replace(changed, work=tmp_path / "other"))
    assert states_equal(train(student(), OBJECTIVE, changed), fresh)


def test_the_result_matches_adamw_with_a_hand_computed_average(run: Training) -> None:
    found = train(student(), OBJECTIVE, run)

    model = student().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=run.learning_rate, betas=(0.9, 0.99), weight_decay=0.0)
    average = copy.deepcopy([p.detach() for p in model.parameters()])
    for step in range(run.steps):
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * learning_rate_factor(step, run.steps, run.warmup)
        optimizer.zero_grad()
        loss_of(model, *draw(step_generator(run.seed, step))).backward()
        nn.utils.clip_grad_norm_(model.parameters(), GRADIENT_CLIP)
        optimizer.step()
        decay = min(run.ema, 1.0 - (1.0 + step) ** -0.75)  # grows from 0, so that the initial weights are forgotten
        average = [decay * a + (1.0 - decay) * p.detach() for a, p in zip(average, model.parameters(), strict=True)]
    for parameter, expected in zip(found.parameters(), average, strict=True):
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("accumulate", [2, 3])
def test_accumulated_batches_train_like_one_large_batch(accumulate: int, run: Training, tmp_path: Path) -> None:
    def draw_all(generator: torch.Generator, share: float) -> tuple[torch.Tensor]:
        step = round(share * run.steps)
        batches = [draw(step_generator(run.seed, step * accumulate + i)) for i in range(accumulate)]
        return (torch.cat([x for (x,) in batches]),)

    large = train(student().double(), in_float64(draw_all), replace(run, work=tmp_path / "large"))
    small = train(student().double(), in_float64(draw), replace(run, accumulate=accumulate))
    for name, expected in large.state_dict().items():
        torch.testing.assert_close(small.state_dict()[name], expected, atol=1e-12, rtol=1e-10)
    assert not states_equal(train(student().double(), in_float64(draw), replace(run, work=tmp_path / "one")), small)


def in_float64(draw_of: Callable[[torch.Generator, float], tuple[torch.Tensor]]) -> Objective:
    return Objective(draw_of, lambda model, x: loss_of(model, x.double()))


@pytest.mark.parametrize("batch", [1, 7, 11, 19])
def test_a_run_killed_between_accumulated_batches_ends_bit_identical(batch: int, run: Training, tmp_path: Path) -> None:
    run = replace(run, accumulate=2)
    uninterrupted = train(student(), OBJECTIVE, replace(run, work=tmp_path / "other"))
    with pytest.raises(KilledError):
        train(student(), killed_at(batch), run)
    done: list[int] = []
    assert states_equal(train(student(), counting(done), run), uninterrupted)
    assert len(done) == 2 * (10 - batch // 2 // 3 * 3)


def test_the_state_of_a_run_with_other_accumulation_is_ignored(run: Training) -> None:
    with pytest.raises(KilledError):
        train(student(), killed_at(8), run)
    done: list[int] = []
    train(student(), counting(done), replace(run, accumulate=2))
    assert len(done) == 2 * 10


def test_all_batches_of_a_step_have_what_was_chosen_for_it(run: Training) -> None:
    seen: list[int] = []

    def choose(generator: torch.Generator) -> tuple[int]:
        return (int(torch.randint(0, 2**31, (), generator=generator)),)

    def loss(model: nn.Module, chosen: int, x: torch.Tensor) -> torch.Tensor:
        seen.append(chosen)
        return loss_of(model, x)

    train(student(), Objective(draw, loss, choose), replace(run, accumulate=3))
    assert seen[::3] == seen[1::3] == seen[2::3] and len(set(seen)) == run.steps


def test_the_launcher_does_not_set_the_accumulation(
    run: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = train(student(), OBJECTIVE, replace(run, work=tmp_path / "other"))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert states_equal(train(student(), OBJECTIVE, run), expected)


def test_a_trained_model_is_placed_again_by_the_next_training(
    run: Training, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    placed: list[bool] = []
    place = Accelerator.prepare_model

    def observed_place(self: Accelerator, model: nn.Module, **how: Any) -> nn.Module:
        placed.append(getattr(model, "_is_accelerate_prepared", False))
        return place(self, model, **how)

    monkeypatch.setattr(Accelerator, "prepare_model", observed_place)
    first = train(student(), OBJECTIVE, run)
    train(copy.deepcopy(first), OBJECTIVE, replace(run, work=tmp_path / "next"))
    assert placed == [False, False]  # a model with that mark would stay on the CPU


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    factors = [learning_rate_factor(step, 100, 10) for step in range(101)]
    assert factors[0] == pytest.approx(0.1) and max(factors) == factors[9] < 1.0
    assert all(a > b for a, b in itertools.pairwise(factors[9:]))
    assert factors[99] < 1e-3 and factors[100] == pytest.approx(0.0, abs=1e-12)
    assert learning_rate_factor(0, 1, 0) == 1.0


def test_every_step_draws_different_noise() -> None:
    draws = {float(torch.randn((), generator=step_generator(seed, step))) for seed in (0, 1) for step in range(20)}
    assert len(draws) == 40


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_loss_ends_the_run_and_keeps_the_last_saved_state(value: float, run: Training) -> None:
    step_numbers = iter(range(100))

    def loss(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
        return loss_of(model, x) * (value if next(step_numbers) == 7 else 1.0)

    with pytest.raises(
        TrainingDivergedError, match=r"distill recover: the loss is .* at step 7 of 10; lower learning_rate"
    ):
        train(student(), Objective(draw, loss), run)
    assert TrainingDivergedError.exit_code == 2
    done: list[int] = []
    train(student(), counting(done), run)
    assert len(done) == 10 - 6  # resumes from the last save, which is finite


def test_a_damaged_training_state_is_named_in_the_error(run: Training) -> None:
    with pytest.raises(KilledError):
        train(student(), killed_at(8), run)
    file = run.work / "training.safetensors"
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(InvalidInputError, match=r"training\.safetensors: .*delete it to start over"):
        train(student(), OBJECTIVE, run)


@pytest.mark.parametrize(
    "failure",
    [OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), SafetensorError("I/O error: No space left on device")],
)
def test_a_full_disk_is_reported_in_one_line_and_keeps_the_previous_state(
    failure: Exception, run: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KilledError):
        train(student(), killed_at(4), run)

    def full(*args: object, **kwargs: object) -> None:
        raise failure

    before = (run.work / "training.safetensors").read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr("diffpress.compress.training.resume.save_file", full)
        with pytest.raises(InvalidInputError, match=r"training.*No space left"):
            train(student(), OBJECTIVE, run)
    assert (run.work / "training.safetensors").read_bytes() == before
