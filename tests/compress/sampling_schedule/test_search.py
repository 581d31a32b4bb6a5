"""compress/sampling_schedule/search.py: paths against brute force, costs against their definition, and the stage around it."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ScheduleConfig
from diffpress.compress.context import Context
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.sampling_schedule.search import best_path, fine_timesteps, jump_costs, loss, refined
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import betas_schedule, noise_level_at
from diffpress.runtime.sampling_plan import make_plan, plan_levels
from diffpress.runtime.spec import DenoiserSpec

COSINE = betas_schedule("squaredcos_cap_v2", 1000)
SPEC = DenoiserSpec("sample", COSINE, (1, 4, 4), make_plan("ipndm", 4, COSINE, spacing="linspace", clip=False))
NOTHING = ConditioningInputs()


@dataclass
class Modes:
    """Predicts the ideal x_0 of pixels that are 0.7 or -0.7, each with a deviation of `deviation`."""

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


def fused(network, spec: DenoiserSpec, count: int = 12, fine: int = 24):
    grid = fine_timesteps(spec, fine)
    return grid, *jump_costs(network, spec, grid, count, 5, NOTHING)


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.5])
def test_a_path_is_the_best_of_all(steps, gamma) -> None:
    costs = np.random.default_rng(steps).random((9, 9))

    def value(path: tuple[int, ...]) -> float:
        return sum(gamma**k * costs[i, j] for k, (i, j) in enumerate(itertools.pairwise((*path, 8))))

    every = [(0, *rest) for rest in itertools.combinations(range(1, 8), steps - 1)]
    assert best_path(costs, steps, gamma) == min(every, key=value)


def test_costs_are_the_errors_of_single_jumps() -> None:
    network = Modes()
    grid, costs, ends = fused(network, SPEC)
    # one walk of the fine grid in batches of 5, 5 and 2, and not one call more
    assert len(network.calls) == 3 * len(grid) and sum(network.calls) == 12 * len(grid)
    levels = plan_levels(COSINE, grid)
    assert costs.shape == (len(levels), len(levels)) and ends.shape == (12, 1, 4, 4)
    assert (costs[np.tril_indices(len(levels))] == 0).all() and (costs[np.triu_indices(len(levels), 2)] > 0).all()
    # neighbours are near: a long jump is worse than the first of its parts
    assert all(costs[i, i + 1] < costs[i, -1] for i in range(len(levels) - 2))


def test_straight_trajectories_cost_nothing() -> None:
    """Data that is one image: every jump is exact."""
    _grid, costs, ends = fused(Still(), SPEC)
    assert costs.max() < 1e-4 and np.abs(ends - 0.3).max() < 1e-5


class Still(Modes):
    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        return np.full_like(inputs["sample"], 0.3)


def test_a_found_schedule_comes_nearer_and_refining_nearer_still() -> None:
    network = Modes()
    grid, costs, ends = fused(network, SPEC, count=24, fine=40)

    def loss_of(timesteps: tuple[float, ...]) -> float:
        return loss(network, SPEC, timesteps, ends, 8, NOTHING)

    found = tuple(grid[i] for i in best_path(costs, 4, 1.0))
    nearer, value = refined(found, loss_of(found), loss_of, 6, 999.0, True)
    assert found[0] == grid[0] and loss_of(found) < loss_of(SPEC.plan.timesteps)
    assert value == loss_of(nearer) < 0.5 * loss_of(found)


@pytest.mark.parametrize("whole", [True, False])
def test_moved_timesteps_descend_within_the_schedule(whole) -> None:
    tried = {}

    def loss_of(timesteps: tuple[float, ...]) -> float:
        tried[timesteps] = sum(abs(t - wanted) for t, wanted in zip(timesteps, (2000.0, 600.4, -50.0), strict=True))
        return tried[timesteps]

    found, value = refined((900.0, 500.0, 20.0), 1e9, loss_of, 40, 999.0, whole)
    assert all(999 >= t[0] > t[1] > t[2] >= 0 for t in tried) and value == min(tried.values())
    assert found[1] == pytest.approx(600.4, abs=1.0) and found[0] > 950 and found[2] < 5
    assert not whole or all(t == round(t) for t in found)


def test_the_fine_grid_holds_the_plan_and_starts_where_it_does() -> None:
    spec = SPEC.with_plan(SPEC.plan.over((800.0, 411.0, 3.0)))
    grid = fine_timesteps(spec, 30)
    assert grid[0] == 800.0 and set(spec.plan.timesteps) <= set(grid) and 20 < len(grid) <= 33
    assert list(grid) == sorted(set(grid), reverse=True)


def context_of(checkpoint: Checkpoint, tmp_path: Path) -> Context:
    return Context(0, tmp_path, checkpoint)


def test_the_stage_changes_the_plan_alone_and_tells_what_it_found(plain, tmp_path) -> None:
    ctx = context_of(plain, tmp_path)
    config = ScheduleConfig(solver="ipndm", steps=3, search="gits", refine=1, samples=4, fine=8, batch=3)
    result = schedule(plain, config, ctx)
    cond = ctx.notes["search"]
    assert list(result.spec.plan.timesteps) == cond["timesteps"] and result.spec.plan.solver == "ipndm"
    assert len(cond["timesteps"]) == 3 and cond["loss"]["refined"] <= min(cond["loss"].values()) + 1e-9
    assert result.model is plain.model
    assert replace(result.spec, plan=plain.spec.plan) == plain.spec
    again = context_of(plain, tmp_path)
    assert schedule(plain, config, again).spec == result.spec and again.notes == ctx.notes


def test_given_timesteps_and_options_become_the_plan(plain, tmp_path) -> None:
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
        ({"refine": 3}, "refine: for a search alone"),
        ({"timesteps": (9.0, 1.0), "steps": 2}, "timesteps are given: leave out steps"),
        ({"timesteps": (9.0, 1.0), "search": "gits"}, "timesteps are given: leave out search"),
        ({"search": "gits", "steps": 50, "fine": 50}, "fine 50 must be more than the 50 steps"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, message) -> None:
    with pytest.raises(ValidationError, match=message):
        ScheduleConfig(**settings)


def test_a_model_that_makes_no_numbers_is_refused(plain, tmp_path) -> None:
    broken = plain.evolve(model=plain.clone_model())
    with torch.no_grad():
        next(broken.model.parameters()).fill_(float("nan"))
    config = ScheduleConfig(steps=3, search="gits", samples=2, fine=8)
    with pytest.raises(InvalidInputError, match="NaN or infinite"):
        schedule(broken, config, context_of(broken, tmp_path))
