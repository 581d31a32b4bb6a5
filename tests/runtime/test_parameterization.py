"""runtime/parameterization.py: conversions invert each other, for one level in numpy and a batch in torch."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.noise_schedule import CLEAN, NoiseLevel
from diffpress.runtime.parameterization import (
    MIN_DIVISOR,
    implied_x0,
    noise_in,
    to_epsilon,
    to_output,
    to_x0,
    transfer,
)

PREDICTIONS = ["epsilon", "v", "sample", "flow"]
VP, VP_LESS = NoiseLevel(70.0, 0.6, 0.8), NoiseLevel(30.0, 0.8, 0.6)
FLOW, FLOW_LESS = NoiseLevel(70.0, 0.3, 0.7), NoiseLevel(30.0, 0.7, 0.3)


class Batch(NamedTuple):
    t: Any
    alpha: Any
    sigma: Any


def batch_of(*levels: NoiseLevel) -> Batch:
    """Return the levels as float32 tensors [B, 1]."""
    torch = pytest.importorskip("torch")
    return Batch(*(torch.tensor(column, dtype=torch.float32).view(-1, 1) for column in zip(*levels, strict=True)))


def pair(*shape: int) -> tuple[np.ndarray, np.ndarray]:
    x0, eps = np.random.default_rng(0).standard_normal((2, *shape))
    return x0, eps


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_x0_and_epsilon_come_back_from_the_output_that_corresponds_to_them(prediction: str) -> None:
    level, (x0, eps) = FLOW if prediction == "flow" else VP, pair(3, 5)
    x, out = level.alpha * x0 + level.sigma * eps, to_output(prediction, x0, eps, level)
    np.testing.assert_allclose(to_x0(prediction, x, out, level), x0, atol=1e-12)
    np.testing.assert_allclose(to_epsilon(prediction, x, out, level), eps, atol=1e-12)
    np.testing.assert_allclose(noise_in(x, x0, level), eps, atol=1e-12)


@pytest.mark.parametrize(("now", "less"), [(VP, VP_LESS), (FLOW, FLOW_LESS)])
def test_the_transfer_stays_on_the_line_through_x0_and_epsilon(now: NoiseLevel, less: NoiseLevel) -> None:
    x0, eps = pair(3, 5)
    x = now.alpha * x0 + now.sigma * eps
    moved = transfer(x, x0, now, less)
    np.testing.assert_allclose(moved, less.alpha * x0 + less.sigma * eps, atol=1e-12)
    np.testing.assert_allclose(implied_x0(x, moved, now, less), x0, atol=1e-12)
    np.testing.assert_array_equal(transfer(x, x0, now, CLEAN), x0)
    np.testing.assert_array_equal(transfer(x0, x0, CLEAN, CLEAN), x0)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_batch_of_levels_in_torch_gives_what_each_level_gives_in_numpy(prediction: str) -> None:
    torch = pytest.importorskip("torch")
    levels, less = (VP, FLOW, VP_LESS), (VP_LESS, FLOW_LESS, CLEAN)
    now, next = batch_of(*levels), batch_of(*less)
    x, out = (array.astype(np.float32) for array in pair(3, 5))
    tensors = torch.from_numpy(x), torch.from_numpy(out)
    for convert in (to_x0, to_epsilon, to_output):
        found = convert(prediction, *tensors, now)
        assert isinstance(found, torch.Tensor) and found.dtype == torch.float32
        for i, level in enumerate(levels):
            np.testing.assert_allclose(found[i].numpy(), convert(prediction, x[i], out[i], level), rtol=1e-5, atol=1e-6)
    for move in (transfer, implied_x0):
        found = move(*tensors, now, next)
        for i, (level, after) in enumerate(zip(levels, less, strict=True)):
            np.testing.assert_allclose(found[i].numpy(), move(x[i], out[i], level, after), rtol=1e-5, atol=1e-6)


def test_epsilon_at_pure_noise_is_refused_in_a_plan_and_bounded_in_training() -> None:
    torch = pytest.importorskip("torch")
    x, out = pair(1, 5)
    with pytest.raises(InvalidInputError, match=r"timestep 99 is pure noise .* start the plan at an earlier timestep"):
        to_x0("epsilon", x, out, NoiseLevel(99.0, 0.0, 1.0))
    found = to_x0("epsilon", torch.from_numpy(x), torch.from_numpy(out), batch_of(NoiseLevel(99.0, 0.0, 1.0)))
    np.testing.assert_allclose(found.numpy(), (x - out) / MIN_DIVISOR, rtol=1e-6)
    found = to_epsilon("sample", torch.from_numpy(x), torch.from_numpy(out), batch_of(CLEAN))
    np.testing.assert_allclose(found.numpy(), (x - out) / MIN_DIVISOR, rtol=1e-6)


def test_one_level_is_never_bounded() -> None:
    x, out = pair(1, 5)
    level = NoiseLevel(99.0, 1e-6, 1.0)
    np.testing.assert_allclose(to_x0("epsilon", x, out, level), (x - out) / 1e-6)
