"""compress/quantization/calibration/observer.py: a killed calibration resumes; non-finite values are located."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.smoothquant import smoothing_vectors
from diffpress.compress.quantization.calibration.calibrate import calibrate, check_calibration
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.quantization.quantize import trajectories_of
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError


def scales(checkpoint: Checkpoint, ctx: Context, **settings: Any) -> dict[str, torch.Tensor]:
    """Every amax and every smoothing vector."""
    config, model = QuantizeConfig(**{"samples": 5, "batch": 3, **settings}), checkpoint.model
    formats, dataset = choose_formats(model, config), trajectories_of(checkpoint, config, ctx)
    check_calibration(formats, config)
    smooth = {}
    if config.smoothquant:
        smooth = smoothing_vectors(dataset, trace_layer_graph(model, checkpoint.spec), formats, config)
    return {**calibrate(dataset, formats, [], smooth, config), **{f"{k}.smooth": value for k, value in smooth.items()}}


class KilledError(Exception):
    pass


class TimestepLog(list[float]):
    """Timesteps at which the network was evaluated; the evaluation after `limit` others is killed."""

    limit: int | None = None


@pytest.fixture
def timesteps_run(monkeypatch: pytest.MonkeyPatch) -> TimestepLog:
    """Log of the timesteps at which the network was evaluated; after `limit` evaluations, the next one is killed."""
    log = TimestepLog()
    run = TorchNetwork.run

    def counting(network: TorchNetwork, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if len(log) == log.limit:
            raise KilledError
        log.append(float(inputs["timestep"][0]))
        return run(network, inputs)

    monkeypatch.setattr(TorchNetwork, "run", counting)
    monkeypatch.setattr("diffpress.compress.quantization.calibration.observer.SAVE_EVERY", 3)
    return log


@pytest.fixture
def small(custom_files: Callable[..., tuple[Path, Path]]) -> Checkpoint:
    """A small custom module: first, time, norm, inner, last; `inner` computes in int8."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


@pytest.mark.parametrize(("killed_at", "every"), [(1, 3), (3, 3), (7, 3), (5, 4)])  # 4: saves at the end of a batch
def test_a_killed_calibration_evaluates_only_what_was_not_saved_and_has_the_same_result(
    killed_at: int,
    every: int,
    unet: Checkpoint,
    context: Callable[..., Context],
    timesteps_run: TimestepLog,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("diffpress.compress.quantization.calibration.observer.SAVE_EVERY", every)
    uninterrupted = scales(unet, replace(context(unet), work=tmp_path / "undisturbed"))
    steps = timesteps_run[:]
    assert len(steps) == 8  # two batches of four steps
    timesteps_run.clear()
    timesteps_run.limit = killed_at
    with pytest.raises(KilledError):
        scales(unet, context(unet))
    timesteps_run.clear()
    timesteps_run.limit = None
    resumed = scales(unet, context(unet))
    assert timesteps_run == steps[killed_at // every * every :]
    assert all(torch.equal(resumed[key], uninterrupted[key]) for key in uninterrupted)


def test_a_calibration_killed_in_its_second_run_does_not_repeat_the_smoothing_run(
    unet: Checkpoint, context: Callable[..., Context], timesteps_run: TimestepLog, tmp_path: Path
) -> None:
    settings = {"smoothquant": {"alpha": 0.5}}
    uninterrupted = scales(unet, replace(context(unet), work=tmp_path / "undisturbed"), **settings)
    total = len(timesteps_run)
    timesteps_run.clear()
    timesteps_run.limit = total - 2
    with pytest.raises(KilledError):
        scales(unet, context(unet), **settings)
    timesteps_run.clear()
    timesteps_run.limit = None
    resumed = scales(unet, context(unet), **settings)
    assert len(timesteps_run) == 1 + 2  # one to trace the layer graph, then evaluations 7 and 8 of the second run
    assert any(key.endswith(".smooth") for key in uninterrupted) and all(
        torch.equal(resumed[k], uninterrupted[k]) for k in uninterrupted
    )


@pytest.mark.parametrize("change", ["config", "checkpoint"])
def test_state_saved_by_another_run_is_not_used(
    change: str, unet: Checkpoint, plain: Checkpoint, context: Callable[..., Context], timesteps_run: TimestepLog
) -> None:
    timesteps_run.limit = 7
    with pytest.raises(KilledError):
        scales(unet, context(unet))
    timesteps_run.clear()
    timesteps_run.limit = None
    other = plain if change == "checkpoint" else unet
    scales(other, context(other), calibration={"percentile": 99.0 if change == "config" else 99.99})
    assert len(timesteps_run) == 8


def test_a_saved_state_that_cannot_be_read_is_refused(unet: Checkpoint, context: Callable[..., Context]) -> None:
    ctx = context(unet)
    ctx.work.mkdir()
    (ctx.work / "calibrate.safetensors").write_bytes(b"half a fi")
    with pytest.raises(InvalidInputError, match=r"calibrate\.safetensors: .* delete it to start over"):
        scales(unet, ctx)


def test_a_short_calibration_writes_nothing(unet: Checkpoint, context: Callable[..., Context]) -> None:
    scales(unet, context(unet), samples=3)
    assert not context(unet).work.exists()


# --- non-finite values -----------------------------------------------------------------------------------------


class NonFiniteBelow(nn.Module):
    """The gate after the second layer returns `value` at timesteps below `below`; later layers propagate it."""

    def __init__(self, value: float, below: float) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(1, 1, 1) for _ in range(3))
        self.gate, self.last = Gate(value, below), nn.Conv2d(1, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.last(self.third(self.gate(self.second(self.first(sample)), timestep)))


class Gate(nn.Module):
    def __init__(self, value: float, below: float) -> None:
        super().__init__()
        self.value, self.below = value, below

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.where(timestep.view(-1, 1, 1, 1) < self.below, torch.full_like(x, self.value), x)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_the_first_layer_that_is_not_finite_is_named_immediately_with_its_timestep(
    value: float, custom: Callable[..., Checkpoint], context: Callable[..., Context], timesteps_run: TimestepLog
) -> None:
    checkpoint = custom(NonFiniteBelow(value, below=40.0), plan_steps=5)
    timesteps = checkpoint.spec.plan.timesteps
    broken = next(t for t in timesteps if t < 40)
    with pytest.raises(InvalidInputError, match=rf"layer 'gate' is not finite at timestep {broken:g} ") as raised:
        scales(checkpoint, context(checkpoint))
    assert "\n" not in str(raised.value)
    # the last timestep is evaluated once more to locate the layer
    assert timesteps_run == [*timesteps[: timesteps.index(broken) + 1], broken]


def test_a_broken_weight_in_the_last_layer_is_named(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    model = NonFiniteBelow(0.0, below=-1.0)
    with torch.no_grad():
        model.last.weight.fill_(float("nan"))
    checkpoint = custom(model)
    first = checkpoint.spec.plan.timesteps[0]
    with pytest.raises(InvalidInputError, match=re.escape(f"layer 'last' is not finite at timestep {first:g} ")):
        scales(checkpoint, context(checkpoint))


# --- evaluations -----------------------------------------------------------------------------------------------


def test_formats_without_quantized_activations_do_not_run_the_model(
    unet: Checkpoint, context: Callable[..., Context], timesteps_run: TimestepLog
) -> None:
    found = scales(unet, context(unet), layers=())
    assert found and not timesteps_run and not any(key.endswith(".input") for key in found)


def test_entropy_is_refused_for_float_formats_before_the_model_runs(
    unet: Checkpoint, context: Callable[..., Context], timesteps_run: TimestepLog
) -> None:
    with pytest.raises(InvalidInputError, match=r"entropy requires integer formats, but layer '.*' is in fp8; use mse"):
        scales(unet, context(unet), calibration="entropy", format="fp8")
    assert not timesteps_run


def test_a_few_step_student_is_calibrated_on_exactly_its_few_steps(
    unet: Checkpoint, context: Callable[..., Context], timesteps_run: TimestepLog
) -> None:
    student = schedule(unet, ScheduleConfig(solver="dpmpp_2m", steps=2, spacing="logsnr"), context(unet))
    scales(student, context(unet), samples=4, batch=2)
    assert timesteps_run == [round(t) for t in student.spec.plan.timesteps] * 2 and len(timesteps_run) == 4


def test_the_batch_size_does_not_change_the_scales(unet: Checkpoint, context: Callable[..., Context]) -> None:
    one, many = (scales(unet, context(unet), batch=batch, calibration="step_means") for batch in (1, 5))
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-4, atol=1e-6)
