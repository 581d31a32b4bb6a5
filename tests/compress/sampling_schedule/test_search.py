"""compress/sampling_schedule: paths against brute force, costs by definition, and the stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.sampling_schedule.config import ScheduleConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.sampling_schedule.search import best_path, fine_timesteps, jump_costs, loss, refine_timesteps
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs, Network
from diffpress.runtime.noise_schedule import betas_schedule, noise_level_at
from diffpress.runtime.sampling_plan import make_plan, plan_levels
from diffpress.runtime.spec import DenoiserSpec

COSINE = betas_schedule("squaredcos_cap_v2", 1000)
SPEC = DenoiserSpec("sample", COSINE, (1, 4, 4), make_plan("ipndm", 4, COSINE, spacing="linspace", clip=False))
UNCONDITIONAL = ConditioningInputs()


@dataclass
class TwoModes:
    """Exact denoiser of pixels at 0.7 or -0.7 with standard deviation `deviation`."""

    deviation: float = 0.2
    calls: list[int] = field(default_factory=list)

    @property
    def inputs(self) -> dict[str, np.dtype]:
        return {"sample": np.dtype(np.float32), "timestep": np.dtype(np.float32)}

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        x, level = inputs["sample"].astype(np.float64), noise_level_at(COSINE, float(inputs["timestep"][0]))
        self.calls.append(len(x))
        variance = (level.alpha * self.deviation) ** 2 + level.sigma**2
        mode = 0.7 * np.tanh(0.7 * level.alpha * x / variance)
        gain = level.alpha * self.deviation**2 / variance
        return (mode + gain * (x - level.alpha * mode)).astype(np.float32)


def costs_of(
    network: Network, spec: DenoiserSpec, count: int = 12, fine: int = 24
) -> tuple[tuple[float, ...], np.ndarray, np.ndarray]:
    fine_grid = fine_timesteps(spec, fine)
    return fine_grid, *jump_costs(network, spec, fine_grid, count, 5, UNCONDITIONAL)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.5])
def test_the_path_is_the_best_of_all_paths(steps: int, gamma: float) -> None:
    costs = np.random.default_rng(steps).random((9, 9))

    def value(path: tuple[int, ...]) -> float:
        return sum(gamma**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise((*path, 8))))

    all_paths = [(0, *rest) for rest in itertools.combinations(range(1, 8), steps - 1)]
    assert best_path(costs, steps, gamma) == min(all_paths, key=value)


def test_costs_are_the_errors_of_single_jumps() -> None:
    network = TwoModes()
    fine_grid, costs, ends = costs_of(network, SPEC)
    # one trajectory over the fine timesteps in batches of 5, 5 and 2, and no further evaluation
    assert len(network.calls) == 3 * len(fine_grid) and sum(network.calls) == 12 * len(fine_grid)
    levels = plan_levels(COSINE, fine_grid)
    assert costs.shape == (len(levels), len(levels)) and ends.shape == (12, 1, 4, 4)
    assert (costs[np.tril_indices(len(levels))] == 0).all() and (costs[np.triu_indices(len(levels), 2)] > 0).all()
    # a long jump has a larger error than its first step
    assert all(costs[i, i + 1] < costs[i, -1] for i in range(len(levels) - 2))


def test_straight_trajectories_have_no_cost() -> None:
    """If the data is one image, every jump is exact."""
    _grid, costs, ends = costs_of(Constant(), SPEC)
    assert costs.max() < 1e-4 and np.abs(ends - 0.3).max() < 1e-5


class Constant(TwoModes):
    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.full_like(inputs["sample"], 0.3)


def test_searched_timesteps_lower_the_loss_and_refining_lowers_it_further() -> None:
    network = TwoModes()
    fine_grid, costs, ends = costs_of(network, SPEC, count=24, fine=40)

    def loss_of(timesteps: tuple[float, ...]) -> float:
        return loss(network, SPEC, timesteps, ends, 8, UNCONDITIONAL)

    found = tuple(fine_grid[i] for i in best_path(costs, 4, 1.0))
    nearer, value = refine_timesteps(found, loss_of(found), loss_of, 6, 999.0, True)
    assert found[0] == fine_grid[0] and loss_of(found) < loss_of(SPEC.plan.timesteps)
    assert value == loss_of(nearer) < 0.5 * loss_of(found)


@pytest.mark.parametrize("integral", [True, False])
def test_refined_timesteps_descend_within_the_schedule(integral: bool) -> None:
    losses = {}

    def loss_of(timesteps: tuple[float, ...]) -> float:
        losses[timesteps] = sum(abs(t - target) for t, target in zip(timesteps, (2000.0, 600.4, -50.0), strict=True))
        return losses[timesteps]

    found, value = refine_timesteps((900.0, 500.0, 20.0), 1e9, loss_of, 40, 999.0, integral)
    assert all(999 >= t[0] > t[1] > t[2] >= 0 for t in losses) and value == min(losses.values())
    assert found[1] == pytest.approx(600.4, abs=1.0) and found[0] > 950 and found[2] < 5
    assert not integral or all(t == round(t) for t in found)


def test_the_fine_timesteps_contain_the_plan_and_start_with_it() -> None:
    spec = SPEC.with_plan(SPEC.plan.over((800.0, 411.0, 3.0)))
    fine_grid = fine_timesteps(spec, 30)
    assert fine_grid[0] == 800.0 and set(spec.plan.timesteps) <= set(fine_grid) and 20 < len(fine_grid) <= 33
    assert list(fine_grid) == sorted(set(fine_grid), reverse=True)


def context_of(checkpoint: Checkpoint, tmp_path: Path) -> Context:
    return Context(0, tmp_path, checkpoint)


def test_the_stage_changes_only_the_plan_and_records_the_search(plain: Checkpoint, tmp_path: Path) -> None:
    ctx = context_of(plain, tmp_path)
    config = ScheduleConfig(solver="ipndm", steps=3, search="gits", refine=1, samples=4, fine=8, batch=3)
    result = schedule(plain, config, ctx)
    notes = ctx.notes["search"]
    assert list(result.spec.plan.timesteps) == notes["timesteps"] and result.spec.plan.solver == "ipndm"
    assert len(notes["timesteps"]) == 3 and notes["loss"]["refined"] <= min(notes["loss"].values()) + 1e-9
    assert result.model is plain.model
    assert replace(result.spec, plan=plain.spec.plan) == plain.spec
    again = context_of(plain, tmp_path)
    assert schedule(plain, config, again).spec == result.spec and again.notes == ctx.notes


def test_explicit_timesteps_and_options_become_the_plan(plain: Checkpoint, tmp_path: Path) -> None:
    last = len(plain.spec.schedule) - 1
    options = {"guidance_interval": (0.2, None), "guidance_rescale": 0.5, "threshold": 0.99}
    config = ScheduleConfig(solver="unipc_2", timesteps=(float(last), 3.0, 1.0), **options)
    plan = schedule(plain, config, context_of(plain, tmp_path)).spec.plan
    assert (plan.solver, plan.timesteps) == ("unipc_2", (float(last), 3.0, 1.0))
    assert plan.guidance_interval == (0.2, None) and plan.guidance_rescale == 0.5
    assert plan.threshold is not None and plan.threshold.ratio == 0.99
    for timesteps, message in [((1e6, 3.0), "lies beyond the last"), ((3.0, 3.0), "strictly descending")]:
        with pytest.raises(InvalidInputError, match=message):
            schedule(plain, ScheduleConfig(timesteps=timesteps), context_of(plain, tmp_path))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"solver": "lcm", "search": "gits"}, "search: lcm with eta 0 adds noise"),
        ({"solver": "ddim", "eta": 0.5, "search": "gits"}, "ddim with eta 0.5 adds noise"),
        ({"refine": 3}, "refine: only used by a search"),
        ({"timesteps": (9.0, 1.0), "steps": 2}, "timesteps is set explicitly: remove steps"),
        ({"timesteps": (9.0, 1.0), "search": "gits"}, "timesteps is set explicitly: remove search"),
        ({"search": "gits", "steps": 50, "fine": 50}, "fine 50 must be greater than steps 50"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        ScheduleConfig(**settings)


def test_a_model_with_nan_outputs_is_refused(plain: Checkpoint, tmp_path: Path) -> None:
    broken = plain.evolve(model=plain.clone_model())
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    config = ScheduleConfig(steps=3, search="gits", samples=2, fine=8)
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        schedule(broken, config, context_of(broken, tmp_path))
