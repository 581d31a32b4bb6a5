"""compress/sampling_schedule/step_cache.py: patterns against brute force, errors by definition, and the stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, Source
from diffpress.compress.context import Context
from diffpress.compress.sampling_schedule import step_cache, step_patterns
from diffpress.compress.sampling_schedule.config import ScheduleConfig, StepCacheConfig
from diffpress.compress.sampling_schedule.schedule import schedule
from diffpress.compress.sampling_schedule.step_cache import Method, choose_step_cache
from diffpress.compress.sampling_schedule.step_errors import sampled_trajectories
from diffpress.compress.sampling_schedule.step_patterns import Pattern, best_patterns
from diffpress.runtime.caching.forecast import Forecasting
from diffpress.runtime.caching.step_cache import StepCache
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.noise_schedule import NoiseLevel
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan, plan_steps
from diffpress.runtime.spec import DenoiserSpec
from tests.compress.sampling_schedule.test_search import COSINE, Constant, TwoModes

UNCONDITIONAL = ConditioningInputs()


def spec_of(solver: str = "ddim", steps: int = 10) -> DenoiserSpec:
    return DenoiserSpec("sample", COSINE, (1, 4, 4), make_plan(solver, steps, COSINE, spacing="logsnr", clip=False))


def rival_of(spec: DenoiserSpec, steps: int) -> SamplingPlan:
    return spec.plan.over(make_plan("ddim", steps, COSINE, spacing="logsnr").timesteps)


def chosen(
    spec: DenoiserSpec, network: TwoModes | None = None, **config: Any
) -> tuple[StepCache | None, dict[str, Any]]:
    settings = StepCacheConfig(**{"samples": 6, "batch": 4, **config})
    return choose_step_cache(network or TwoModes(), spec, settings, UNCONDITIONAL, lambda n: rival_of(spec, n))


@pytest.mark.parametrize("order", [0, 1, 2])
@pytest.mark.parametrize("gamma", [0.8, 1.0, 1.5])
@pytest.mark.parametrize("max_gap", [3, 8])
def test_the_pattern_is_the_best_of_all_patterns(
    monkeypatch: pytest.MonkeyPatch, order: int, gamma: float, max_gap: int
) -> None:
    monkeypatch.setattr(step_patterns, "MAX_GAP", max_gap)
    random, steps, table = np.random.default_rng(order), 8, dict[tuple[Pattern, int], float]()

    def error(sources: Pattern, index: int) -> float:
        assert len(sources) <= order + 1 and sources[-1] < index
        return table.setdefault((sources, index), random.random())

    def cost(pattern: Pattern) -> float:
        total = 0.0
        for count, (last, following) in enumerate(itertools.pairwise((*pattern, steps))):
            sources = pattern[: count + 1][-(order + 1) :]
            total += gamma**count * sum(error(sources, j) for j in range(last + 1, following))
        return total

    found = best_patterns(error, steps, order, gamma)
    for full in range(1, steps + 1):
        every = [(0, *rest) for rest in itertools.combinations(range(1, steps), full - 1)]
        allowed = [p for p in every if all(b - a <= max_gap for a, b in itertools.pairwise((*p, steps)))]
        assert (full in found) == bool(allowed)
        if allowed:
            assert cost(found[full]) == pytest.approx(min(map(cost, allowed)))


@pytest.mark.parametrize("order", [0, 1, 2])
def test_errors_are_those_of_forecasts_on_the_trajectory(order: int) -> None:
    spec, network = spec_of(), TwoModes()
    found = sampled_trajectories(network, spec, StepCacheConfig(speedup=2.0, samples=6, batch=4), UNCONDITIONAL)
    assert len(network.calls) == 2 * 10 and found.ends.shape == (6, 1, 4, 4)
    levels = [level for level, _ in plan_steps(COSINE, spec.plan)]
    # outputs of known values: their products give the error of a forecast, which the predictor also makes
    outputs = np.random.default_rng(0).standard_normal((10, 6, 5))
    known = replace(found, products=np.einsum("ind,jnd->nij", outputs, outputs) / 5)
    sources = (0, 2, 5)[-(order + 1) :]
    method = Method("forecast", 0.0, known.forecast_error, (order,))
    cache = method.cache_of(sources if sources[0] == 0 else (0, *sources), 10, order)

    def predict(x: np.ndarray, level: NoiseLevel) -> np.ndarray:
        return outputs[levels.index(level)].astype(np.float32)

    forecasting = Forecasting(predict, cache, levels)
    made = [forecasting(np.zeros(0), level) for level in levels]
    rms = np.sqrt(np.square(made[7] - outputs[7]).mean(axis=1)).mean()
    assert known.forecast_error(sources, 7) == pytest.approx(found.gains[7] * rms, rel=1e-4)


def test_a_step_of_first_order_moves_by_its_gain() -> None:
    from diffpress.runtime.parameterization import to_x0, transfer

    spec = spec_of()
    found = sampled_trajectories(TwoModes(), spec, StepCacheConfig(speedup=2.0, samples=2), UNCONDITIONAL)
    x, out = np.ones(3), np.arange(3.0)
    for gain, (now, after) in zip(found.gains, plan_steps(COSINE, spec.plan), strict=True):
        moved = [transfer(x, to_x0(spec.prediction, x, o, now), now, after) for o in (out, out + 0.5)]
        np.testing.assert_allclose(np.abs(moved[1] - moved[0]), 0.5 * gain, rtol=1e-9)


@pytest.mark.parametrize("order", [None, 0, 1, 2])
def test_a_speedup_gives_the_number_of_evaluations_and_beats_even_patterns(order: int | None) -> None:
    spec = spec_of(steps=16)
    found, notes = chosen(spec, speedup=2.0, order=order)
    assert found is not None and found.counts == {"full": 8, "forecast": 8} and order in (None, found.order)
    assert notes["kept"] and notes["loss_db"] < notes["rival_loss_db"] and notes["full"] == 8
    even = replace(spec.plan, cache=StepCache("forecast", ("full", "forecast") * 8, found.order))
    settings = StepCacheConfig(speedup=2.0, samples=6, batch=4)
    ends = sampled_trajectories(TwoModes(), spec, settings, UNCONDITIONAL).ends
    assert notes["loss_db"] < step_cache._loss_db(TwoModes(), spec.with_plan(even), ends, settings, UNCONDITIONAL)


def test_the_chosen_order_is_the_best_of_all_orders() -> None:
    spec = spec_of(steps=16)
    losses = [chosen(spec, speedup=2.0, order=order, refine=0)[1]["loss_db"] for order in range(3)]
    assert chosen(spec, speedup=2.0, refine=0)[1]["loss_db"] == min(losses) < max(losses)


def test_refining_lowers_the_loss() -> None:
    spec = spec_of(steps=16)
    plain, finer = (chosen(spec, speedup=2.5, order=0, refine=rounds)[1]["loss_db"] for rounds in (0, 4))
    assert finer <= plain


def test_an_error_takes_the_fewest_evaluations_within_it() -> None:
    spec = spec_of(steps=12)
    found, notes = chosen(spec, max_error_db=-25.0, refine=0)
    assert found is not None and notes["loss_db"] <= -25.0 and notes["full"] < 12
    fewer = 12 / (notes["full"] - 1) + 1e-6
    assert chosen(spec, speedup=fewer, refine=0)[1]["loss_db"] > -25.0


@pytest.mark.parametrize(
    ("steps", "config", "reason"),
    [
        (2, {"speedup": 1.2}, "with a plan of 1 steps, which takes the same time"),
        (3, {"max_error_db": -90.0}, "the error is -"),
        (1, {"speedup": 2.0}, "a plan of one step has no earlier one"),
    ],
)
def test_a_plan_of_few_steps_stays_as_it_is_and_the_figure_is_given(
    steps: int, config: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    found, notes = chosen(spec_of(steps=steps), **config)
    assert found is None and not notes["kept"]
    assert "step cache: nothing is gained" in caplog.text and reason in caplog.text


def test_nothing_is_gained_over_a_rival_that_is_exact(caplog: pytest.LogCaptureFixture) -> None:
    """If the data is one image, any number of steps gives it."""
    found, notes = chosen(spec_of(steps=6), Constant(), speedup=2.0)
    assert found is None and notes["loss_db"] >= notes["rival_loss_db"]
    assert "a plan of 3 steps, which takes the same time" in caplog.text


def test_samples_that_are_not_finite_are_refused() -> None:
    class Broken(TwoModes):
        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            return np.full_like(inputs["sample"], np.nan)

    with pytest.raises(InvalidInputError, match="NaN or infinite values"):
        chosen(spec_of(), Broken(), speedup=2.0)


@dataclass
class Halves(TwoModes):
    """The two modes as outer layers, with their gain as the inner layers whose value is reused; it counts both."""

    full: int = 0
    cached: int = 0

    def run_full(self, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        self.full += 1
        out = self.run(inputs)
        return out, 0.5 * out

    def run_cached(self, inputs: dict[str, np.ndarray], features: np.ndarray) -> np.ndarray:
        self.cached += 1
        return 0.5 * self.run(inputs) + features


def test_errors_of_cached_steps_are_measured_with_the_features_of_the_steps_before() -> None:
    spec, network = spec_of(steps=5), Halves()
    found = sampled_trajectories(
        network, spec, StepCacheConfig(kind="features", speedup=1.5, samples=4, batch=4), UNCONDITIONAL, reuses=True
    )
    assert (network.full, network.cached) == (5, 4 + 3 + 2 + 1)
    # a cached output is the mean of that of this step and that of the full one, so half their difference is wrong
    products = found.products
    squares = [[products[:, i, i] + products[:, j, j] - 2 * products[:, i, j] for j in range(5)] for i in range(5)]
    expected = 0.5 * np.sqrt(np.maximum(squares, 0.0)).mean(axis=2)
    np.testing.assert_allclose(found.reused, np.triu(expected, 1), rtol=1e-3, atol=1e-6)
    assert found.reuse_error((0, 2), 4) == pytest.approx(found.gains[4] * found.reused[2, 4])


def test_cached_steps_take_part_of_the_time_of_full_ones() -> None:
    spec = spec_of(steps=12)
    settings = StepCacheConfig(kind="features", speedup=1.5, samples=4, refine=0)

    def rival(steps: int) -> SamplingPlan:
        asked.append(steps)
        return rival_of(spec, steps)

    asked: list[int] = []
    found, notes = choose_step_cache(Halves(), spec, settings, UNCONDITIONAL, rival, cut="up_blocks.1", cached_cost=0.4)
    # full + 0.4 (12 - full) <= 12 / 1.5
    assert found is not None and found.counts == {"full": 5, "cached": 7} and found.cut == "up_blocks.1"
    # 5 + 7 x 0.4 = 7.8 evaluations
    assert asked == [8] and notes["cached_cost"] == 0.4 and notes["loss_db"] < notes["rival_loss_db"]


def test_auto_takes_the_kind_of_smaller_error_at_equal_time() -> None:
    spec = spec_of(steps=12)
    settings = StepCacheConfig(kind="auto", speedup=1.5, samples=4, refine=0)
    for cost, kind in ((0.01, "features"), (0.6, "forecast")):
        found, notes = choose_step_cache(
            Halves(), spec, settings, UNCONDITIONAL, lambda n: rival_of(spec, n), cut="up_blocks.1", cached_cost=cost
        )
        assert found is not None and found.kind == kind
        assert notes["compared"][kind] == min(notes["compared"].values()) and len(notes["compared"]) == 2


@pytest.mark.parametrize(
    ("cost", "message"), [(0.7, "is more than cut up_blocks.1 can give"), (1.2, "takes 1.20 of a full one")]
)
def test_a_cut_that_saves_too_little_gains_nothing(cost: float, message: str, caplog: pytest.LogCaptureFixture) -> None:
    settings, spec = StepCacheConfig(kind="features", speedup=2.0, samples=4), spec_of()
    found, _ = choose_step_cache(
        Halves(), spec, settings, UNCONDITIONAL, lambda n: rival_of(spec, n), cut="up_blocks.1", cached_cost=cost
    )
    assert found is None and message in caplog.text


class Modes(torch.nn.Module):
    """`TwoModes` as a torch module."""

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(TwoModes().run({"sample": sample.numpy(), "timestep": timestep.numpy()}))


def planned(tmp_path: Path, spec: DenoiserSpec | None = None, **config: Any) -> tuple[Checkpoint, dict[str, Any]]:
    checkpoint = Checkpoint(Modes(), spec or spec_of(), Source("custom"))
    ctx = Context(0, tmp_path, checkpoint)
    return schedule(checkpoint, ScheduleConfig(**{"solver": "ddim", "steps": 12, **config}), ctx), ctx.notes


def test_the_stage_writes_the_cache_into_the_plan(tmp_path: Path) -> None:
    settings = {"speedup": 2.0, "samples": 4, "refine": 0}
    result, notes = planned(tmp_path, cache=settings)
    plan = result.spec.plan
    assert plan.cache is not None and plan.cache.counts["full"] == 6 and notes["cache"]["kept"]
    again, _ = planned(tmp_path, spec=result.spec)
    assert again.spec.plan == plan.without_cache  # a stage without a cache removes the old one


def test_searched_timesteps_are_searched_first(tmp_path: Path) -> None:
    settings = {"speedup": 1.5, "samples": 4, "refine": 0}
    search: dict[str, Any] = {"search": "gits", "samples": 4, "fine": 20}
    alone, _ = planned(tmp_path, steps=6, **search)
    both, notes = planned(tmp_path, steps=6, **search, cache=settings)
    assert both.spec.plan.timesteps == alone.spec.plan.timesteps and "rival_loss_db" in notes["cache"]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"cache": {}}, "give speedup or max_error_db, one of them"),
        ({"cache": {"speedup": 2.0, "max_error_db": -20.0}}, "give speedup or max_error_db, one of them"),
        ({"cache": {"speedup": 1.0}}, "cache.speedup"),
        ({"cache": {"max_error_db": 3.0}}, "cache.max_error_db"),
        ({"cache": {"cut": "up_blocks.1", "speedup": 2.0}}, "cut: only used by kind features"),
        ({"cache": {"kind": "features", "order": 1, "speedup": 2.0}}, "order: only used by kind forecast"),
        ({"cache": {"kind": "features", "speedup": 2.0}}, "this Modes has no cut; use kind 'forecast'"),
        ({"cache": {"kind": "teacache", "speedup": 2.0}}, "cache.kind"),
        ({"cache": {"speedup": 2.0, "every": 2}}, "unknown key"),
        ({"solver": "heun", "cache": {"speedup": 2.0}}, "'heun' evaluates the network more than once in a step"),
        ({"eta": 0.3, "cache": {"speedup": 2.0}}, "'ddim' with eta 0.3 adds noise in every step"),
    ],
)
def test_a_cache_that_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidInputError) as caught:
        planned(tmp_path, **config)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_distilled_network_refuses_a_cache_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="between its few steps too much changes for a step cache"):
        planned(tmp_path, spec=replace(spec_of(), distilled="trajectory"), cache={"speedup": 2.0})
