"""compress/search/run.py: stages are shared between trials, and only promising trials get more budget."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.compress import stages
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.search.proxies import Cost, LatencyTable, compared_samples
from diffpress.compress.search.run import RUNGS, Searcher, run_trial
from diffpress.compress.search.settings import Bounds, SearchSettings
from diffpress.compress.search.space import Params, Space
from diffpress.compress.search.study import Result, Trial
from diffpress.compress.stages import StageDef
from diffpress.runtime.sampler import network_evaluations

TRAIN_STEPS = 9
SPACE = Space(("none", "magnitude"), (), ("none",), (2, 3), False, TRAIN_STEPS, batch=4)
PRUNED: Params = {"prune": "magnitude", "macs": 0.65, "distill": "none", "recover": 1.0, "recover_timesteps": "all"}
PLAN: Params = {"solver": "ddim", "steps": 2, "searched": False, "cache": 0.0}
INT8: Params = {"format": "int8", "min_sqnr_db": 0.0}


class Engine:
    """An engine that runs nothing: every network costs half of the teacher's."""

    def __init__(self) -> None:
        self.measured = 0

    def cost(self, checkpoint: Checkpoint, precision: str) -> Cost:
        self.measured += 1
        return Cost(0.5, 1.0)

    @contextmanager
    def open(self, checkpoint: Checkpoint, precision: str) -> Iterator[EvaluationSubject]:
        raise AssertionError("without features nothing is sampled in the engine")
        yield


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """(stage, config) of every stage that is run during the test."""
    calls: list[tuple[str, Any]] = []

    def recorded(stage: StageDef) -> StageDef:
        def call(checkpoint: Checkpoint, config: Any, context: Context) -> Checkpoint:
            calls.append((stage.name, config))
            return stage.run(checkpoint, config, context)

        return replace(stage, run=call)

    for name, stage in list(stages.STAGES.items()):
        monkeypatch.setitem(stages.STAGES, name, recorded(stage))
    return calls


@pytest.fixture
def searcher(unet: Checkpoint, npz: Path, tmp_path: Path) -> Searcher:
    settings = SearchSettings(engine="onnxruntime", train_steps=TRAIN_STEPS, data=npz)
    table = LatencyTable(tmp_path / "latencies.json", "onnxruntime", unet.hash)
    return Searcher(unet, settings, SPACE, tmp_path / "out", Engine(), table, None, compared_samples(unet))


def finished(params: Params, result: Result, number: int = 0) -> Trial:
    return Trial(number, params, result)


def test_a_trial_that_differs_only_in_its_quantization_runs_only_that(
    searcher: Searcher, ran: list[tuple[str, Any]]
) -> None:
    first = {**PRUNED, **PLAN, **INT8}
    assert run_trial(searcher, first, []).failure == ""
    names = [name for name, _ in ran]
    assert names == ["prune", "distill", "schedule", "quantize"] + ["distill", "schedule", "quantize"] * 2
    ran.clear()
    assert run_trial(searcher, first | {"format": "w4a8"}, []).failure == ""
    assert [name for name, _ in ran] == ["quantize"] * len(RUNGS)


def test_training_grows_with_the_budget_while_a_trial_is_promising(
    searcher: Searcher, ran: list[tuple[str, Any]]
) -> None:
    result = run_trial(searcher, {**PRUNED, **PLAN, "format": "fp16"}, [])
    assert [config.steps for name, config in ran if name == "distill"] == [1, 3, 9]
    assert len(result.errors_db) == len(RUNGS) and result.quality == result.errors_db[-1]


def test_a_dominated_trial_stops_at_the_least_budget(searcher: Searcher, ran: list[tuple[str, Any]]) -> None:
    better = finished({"prune": "none", "distill": "none"}, Result(0.01, 1.0, (-99.0,), quality=-99.0))
    result = run_trial(searcher, {**PRUNED, **PLAN, "format": "fp16"}, [better])
    assert [config.steps for name, config in ran if name == "distill"] == [1]
    assert len(result.errors_db) == 1


def test_latency_is_the_tables_step_times_the_evaluations(searcher: Searcher, unet: Checkpoint) -> None:
    result = run_trial(searcher, {"prune": "none", "distill": "none", **PLAN, "format": "fp16"}, [])
    assert result.latency_ratio == 0.5 * 2 / network_evaluations(unet.spec) and result.size_mib == 1.0
    assert isinstance(searcher.engine, Engine) and searcher.engine.measured == 1
    run_trial(searcher, {"prune": "none", "distill": "none", **PLAN, "steps": 3, "format": "fp16"}, [])
    assert searcher.engine.measured == 1  # another plan is the same network


def test_a_bound_that_is_exceeded_is_recorded(searcher: Searcher) -> None:
    bounded = replace(
        searcher,
        settings=searcher.settings.model_copy(update={"bounds": Bounds(max_latency_ratio=0.1, max_size_mib=2.0)}),
    )
    result = run_trial(bounded, {"prune": "none", "distill": "none", **PLAN, "format": "fp16"}, [])
    assert result.excesses == pytest.approx({"max_latency_ratio": 1.5, "max_size_mib": -0.5})


def test_what_cannot_be_run_is_a_failed_trial_with_its_reason(searcher: Searcher) -> None:
    result = run_trial(
        searcher, {"prune": "none", "distill": "none", **PLAN, "format": "int8", "min_sqnr_db": 150.0}, []
    )
    assert "bounds" in result.failure and "\n" not in result.failure


def test_a_trial_leaves_its_recipe_at_the_full_budget(searcher: Searcher) -> None:
    worse = finished({"prune": "none", "distill": "none"}, Result(0.01, 1.0, (-99.0,), quality=-99.0))
    run_trial(searcher, {**PRUNED, **PLAN, "format": "fp16"}, [worse])
    assert f"steps: {TRAIN_STEPS}" in searcher.recipe_file("trial-001").read_text()


def test_the_same_trial_finds_the_same_twice(searcher: Searcher, tmp_path: Path) -> None:
    params = {**PRUNED, **PLAN, **INT8}
    once = run_trial(searcher, params, [])
    again = run_trial(replace(searcher, out=tmp_path / "other"), params, [])
    assert np.allclose(once.errors_db, again.errors_db) and replace(once, errors_db=()) == replace(again, errors_db=())
