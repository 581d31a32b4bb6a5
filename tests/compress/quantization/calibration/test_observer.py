"""compress/quantization/calibration/observer.py: a calibration goes on where it was killed, and says where numbers end."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import QuantizeConfig, ScheduleConfig
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.calibration.calibrate import calibrate
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError


def scales(checkpoint: Checkpoint, ctx: Context, **settings) -> dict[str, torch.Tensor]:
    """Every amax and every smoothing vector, as `calibrate` gives them."""
    config = QuantizeConfig(**{"samples": 5, "batch": 3, **settings})
    amax, smooth = calibrate(checkpoint, choose_formats(checkpoint.model, config), [], config, ctx)
    return {**amax, **{f"{name}.smooth": value for name, value in smooth.items()}}


class Killed(Exception):
    pass


@pytest.fixture
def asked(monkeypatch) -> list[float]:
    """The timesteps at which the network was asked; `asked.limit` calls are answered and the next one is killed."""

    class Asked(list):
        limit = None

    seen = Asked()
    run = TorchNetwork.run

    def counting(network: TorchNetwork, inputs: dict[str, np.ndarray]) -> np.ndarray:
        if len(seen) == seen.limit:
            raise Killed
        seen.append(float(inputs["timestep"][0]))
        return run(network, inputs)

    monkeypatch.setattr(TorchNetwork, "run", counting)
    monkeypatch.setattr("diffpress.compress.quantization.calibration.observer.SAVE_EVERY", 3)
    return seen


@pytest.fixture
def small(custom_files) -> Checkpoint:
    """The user's little module: first, time, norm, inner, last; `inner` computes in int8."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


@pytest.mark.parametrize(("killed_at", "every"), [(1, 3), (3, 3), (7, 3), (5, 4)])  # 4: saved where a batch ends
def test_a_killed_calibration_asks_only_for_what_was_not_saved_and_ends_the_same(
    killed_at, every, unet, context, asked, tmp_path, monkeypatch
):
    monkeypatch.setattr("diffpress.compress.quantization.calibration.observer.SAVE_EVERY", every)
    whole = scales(unet, replace(context(unet), work=tmp_path / "undisturbed"))
    steps = asked[:]
    assert len(steps) == 8  # two batches of four steps
    asked.clear()
    asked.limit = killed_at
    with pytest.raises(Killed):
        scales(unet, context(unet))
    asked.clear()
    asked.limit = None
    resumed = scales(unet, context(unet))
    assert asked == steps[killed_at // every * every :]
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


def test_a_calibration_killed_after_its_first_run_does_not_smooth_again(unet, context, asked, tmp_path):
    settings = {"smooth": 0.5}
    whole = scales(unet, replace(context(unet), work=tmp_path / "undisturbed"), **settings)
    total = len(asked)
    asked.clear()
    asked.limit = total - 2
    with pytest.raises(Killed):
        scales(unet, context(unet), **settings)
    asked.clear()
    asked.limit = None
    resumed = scales(unet, context(unet), **settings)
    assert len(asked) == 1 + 2  # one call to see what reads what, and calls 7 and 8 of the second run
    assert any(key.endswith(".smooth") for key in whole) and all(torch.equal(resumed[k], whole[k]) for k in whole)


@pytest.mark.parametrize("change", ["config", "checkpoint"])
def test_what_another_run_saved_is_not_taken(change, unet, plain, context, asked):
    asked.limit = 7
    with pytest.raises(Killed):
        scales(unet, context(unet))
    asked.clear()
    asked.limit = None
    other = plain if change == "checkpoint" else unet
    scales(other, context(other), percentile=99.0 if change == "config" else 99.99)
    assert len(asked) == 8


def test_a_saved_state_that_cannot_be_read_is_refused(unet, context):
    ctx = context(unet)
    ctx.work.mkdir()
    (ctx.work / "calibrate.safetensors").write_bytes(b"half a fi")
    with pytest.raises(InvalidInputError, match="calibrate.safetensors: .* delete it to start over"):
        scales(unet, ctx)


def test_a_short_calibration_writes_nothing(unet, context):
    scales(unet, context(unet), samples=3)
    assert not context(unet).work.exists()


# --- what is not finite ----------------------------------------------------------------------------------------


class Breaks(nn.Module):
    """Its second layer's output is not finite below a timestep; the third only passes it on."""

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
def test_the_first_layer_that_is_not_finite_is_named_with_its_timestep_at_once(value, custom, context, asked):
    checkpoint = custom(Breaks(value, below=40.0), plan_steps=5)
    timesteps = checkpoint.spec.plan.timesteps
    broken = next(t for t in timesteps if t < 40)
    with pytest.raises(InvalidInputError, match=rf"layer 'gate' is not finite at timestep {broken:g} ") as raised:
        scales(checkpoint, context(checkpoint))
    assert "\n" not in str(raised.value)
    assert asked == [*timesteps[: timesteps.index(broken) + 1], broken]  # once more, to find where


def test_a_broken_weight_is_named_though_nobody_reads_its_output(custom, context):
    model = Breaks(0.0, below=-1.0)
    with torch.no_grad():
        model.last.weight.fill_(float("nan"))
    checkpoint = custom(model)
    first = checkpoint.spec.plan.timesteps[0]
    with pytest.raises(InvalidInputError, match=re.escape(f"layer 'last' is not finite at timestep {first:g} ")):
        scales(checkpoint, context(checkpoint))


# --- what is run -----------------------------------------------------------------------------------------------


def test_formats_that_round_no_activation_do_not_run_the_model(unet, context, asked):
    found = scales(unet, context(unet), layers=())
    assert found and not asked and not any(key.endswith(".input") for key in found)


def test_entropy_is_refused_for_floats_before_anything_is_run(unet, context, asked):
    with pytest.raises(InvalidInputError, match=r"entropy weighs integers, and layer '.*' is in fp8; take mse"):
        scales(unet, context(unet), calibration="entropy", format="fp8")
    assert not asked


def test_a_few_step_student_is_calibrated_on_exactly_its_few_steps(unet, context, asked):
    student = schedule(unet, ScheduleConfig(solver="dpmpp_2m", steps=2, spacing="logsnr"), context(unet))
    scales(student, context(unet), samples=4, batch=2)
    assert asked == [round(t) for t in student.spec.plan.timesteps] * 2 and len(asked) == 4


def test_the_batch_size_does_not_change_the_scales(unet, context):
    one, many = (scales(unet, context(unet), batch=batch, calibration="step_means") for batch in (1, 5))
    for key in one:
        torch.testing.assert_close(one[key], many[key], rtol=1e-4, atol=1e-6)
