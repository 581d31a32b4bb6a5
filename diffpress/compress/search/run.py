"""The search: propose a recipe, run its stages with growing budgets, measure it, store it; until the budget is spent.

    propose -> stages with 1/9 of the training steps -> latency, size, error
            -> on the front so far?  1/3 of the steps -> still? all of them -> still? Frechet distance to select by

Every trial's stages lie in one stage cache, so a trial that differs from an earlier one only in its last stages runs
only these.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import yaml

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.pipeline import check_start, run_stages
from diffpress.compress.recipe import Recipe, file_reference
from diffpress.compress.search.front import is_promising, violation
from diffpress.compress.search.proxies import (
    Cost,
    LatencyTable,
    compared_samples,
    error_db,
    estimated_ratio,
    latency_key,
)
from diffpress.compress.search.selection import Selection
from diffpress.compress.search.settings import SearchSettings
from diffpress.compress.search.space import NONE, Params, Space, precision_of, stages_for, trains
from diffpress.compress.search.study import Result, Study, Trial
from diffpress.runtime.errors import DiffpressError, MissingDependencyError
from diffpress.runtime.io.files import write_text
from diffpress.runtime.sampler import network_evaluations

logger = logging.getLogger(__name__)

RUNGS = (1 / 9, 1 / 3, 1.0)  # fractions of the training steps

RunTrial = Callable[[Params, Sequence[Trial]], Result]  # (choices, trials before) -> what was found


class TrialEngine(Protocol):
    """Runs checkpoints in the engine of a search (export/search/trial_engine.py)."""

    def cost(self, checkpoint: Checkpoint, precision: str) -> Cost:
        """Measure the checkpoint's graph in this precision of float layers."""
        ...

    def open(self, checkpoint: Checkpoint, precision: str) -> AbstractContextManager[EvaluationSubject]:
        """Open the graph, to sample from it."""
        ...


@dataclass(frozen=True)
class Searcher:
    """What every trial of a search shares.

    Attributes:
        teacher: The checkpoint that is searched for.
        settings: The search's settings.
        space: What can be chosen.
        out: The search's folder.
        engine: Opens checkpoints in the engine.
        latencies: Table of measured steps.
        selection: Features that select; None without any.
        teacher_samples: The teacher's samples [N, ...] that trials are compared with.
        texts: Prompts that select.
    """

    teacher: Checkpoint
    settings: SearchSettings
    space: Space
    out: Path
    engine: TrialEngine
    latencies: LatencyTable
    selection: Selection | None
    teacher_samples: np.ndarray
    texts: tuple[str, ...] = ()

    def recipe_file(self, name: str) -> Path:
        """Return the file of a trial's recipe."""
        return self.out / "trials" / f"{name}.yaml"


def run_search(study: Study, run: RunTrial, trials: int | None, seconds: float | None) -> list[Trial]:
    """Run trials until there are `trials` of them or they took `seconds`, those of earlier runs included."""
    while True:
        done = study.trials
        if trials is not None and len(done) >= trials:
            return done
        if seconds is not None and sum(one.result.seconds for one in done) >= seconds:
            return done
        params = study.propose()
        began = time.monotonic()
        result = run(params, done)
        elapsed = round(time.monotonic() - began, 1)
        _log(study.add(params, replace(result, seconds=elapsed)))


def run_trial(searcher: Searcher, params: Params, done: Sequence[Trial]) -> Result:
    """Run one trial; what cannot be run or measured makes it a failed one."""
    name = f"trial-{len(done):03d}"
    try:
        with _quiet():
            return _measured(searcher, params, done, name)
    except MissingDependencyError:
        raise
    except DiffpressError as error:
        return Result(failure=str(error).partition("\n")[0])


def recipe_text(searcher: Searcher, params: Params, fraction: float = 1.0) -> str:
    """Return a trial's recipe as YAML, with this fraction of its training steps."""
    settings = searcher.settings
    raw: dict[str, Any] = {"seed": settings.seed}
    if settings.data is not None:
        raw["data"] = file_reference(settings.data)
    raw["stages"] = stages_for(params, searcher.space, fraction)
    targets = ["onnx"] if settings.engine == "onnxruntime" else ["onnx", settings.engine]
    raw["export"] = {"targets": targets}
    if precision_of(params) != "fp32":
        raw["export"]["precision"] = precision_of(params)
    return yaml.safe_dump(raw, sort_keys=False, default_flow_style=None, width=110)


def _measured(searcher: Searcher, params: Params, done: Sequence[Trial], name: str) -> Result:
    settings, errors = searcher.settings, list[float]()
    peers = [trial for trial in done if not trial.result.failure and trial.params["distill"] == params["distill"]]
    rungs, precision, ratio = RUNGS if trains(params) else (1.0,), precision_of(params), None
    for rung, fraction in enumerate(rungs):
        checkpoint = _compressed(searcher, params, name, fraction)
        latency, size_mib = _cost(searcher, checkpoint, precision)
        errors.append(error_db(searcher.teacher_samples, compared_samples(checkpoint, searcher.texts)))
        others = [(other, error) for other in peers if (error := _error_at(other, rung)) is not None]
        promising = is_promising(
            (latency, errors[-1]),
            [(other.result.latency_ratio, error) for other, error in others],
            violation(settings.bounds.excesses(latency, None, size_mib)),
            [_cost_excess(searcher, other) for other, _ in others],
        )
        if not promising:
            break
    if promising and searcher.selection is not None:
        with searcher.engine.open(checkpoint, precision) as subject:
            ratio = searcher.selection.ratio(subject)
    quality = errors[-1]
    if searcher.selection is not None:
        quality = ratio if ratio is not None else _estimate(errors[-1], peers, done)
    excesses = settings.bounds.excesses(latency, None if searcher.selection is None else quality, size_mib)
    sqnr = next((r.changed.get("teacher_sqnr_db") for r in reversed(checkpoint.history)), None)
    return Result(latency, size_mib, tuple(errors), sqnr, ratio, quality, excesses)


def _compressed(searcher: Searcher, params: Params, name: str, fraction: float) -> Checkpoint:
    """Run the trial's stages with this fraction of its training steps; the recipe of the full budget is kept."""
    file = searcher.recipe_file(name)
    write_text(file, recipe_text(searcher, params, fraction))
    recipe = Recipe.load(file)
    write_text(file, recipe_text(searcher, params))
    check_start(searcher.teacher, recipe, name)
    # no engine: what a stage measures there would differ between runs
    return run_stages(searcher.teacher, recipe, searcher.out, None, searcher.teacher)


def _cost(searcher: Searcher, checkpoint: Checkpoint, precision: str) -> tuple[float, float]:
    """Return the time of an image as a ratio to the teacher's, and the size in MiB, from the table."""
    key = latency_key(checkpoint, precision)
    step, size_mib = searcher.latencies.cost(key, lambda: searcher.engine.cost(checkpoint, precision))
    return step * network_evaluations(checkpoint.spec) / network_evaluations(searcher.teacher.spec), size_mib


def _cost_excess(searcher: Searcher, trial: Trial) -> float:
    result = trial.result
    return violation(searcher.settings.bounds.excesses(result.latency_ratio, None, result.size_mib))


def _error_at(trial: Trial, rung: int) -> float | None:
    """Return the trial's error with this budget; None if it was not given it. Without training there is one budget."""
    errors = trial.result.errors_db
    if not trains(trial.params):
        return errors[-1]
    return errors[rung] if rung < len(errors) else None


def _estimate(error: float, peers: Sequence[Trial], done: Sequence[Trial]) -> float:
    """Return the estimated Frechet ratio, from trials of the same kind of distillation if any was measured."""
    for trials in (peers, [trial for trial in done if not trial.result.failure]):
        known = [(t.result.errors_db[-1], r) for t in trials if (r := t.result.frechet_ratio) is not None]
        if known:
            return estimated_ratio(error, known)
    return 1.0


def _log(trial: Trial) -> None:
    result, chosen = trial.result, describe(trial.params)
    if result.failure:
        logger.info(f"{trial.name}: {chosen}: failed: {result.failure}")
        return
    measured = "" if result.frechet_ratio is None else f", Frechet ratio {result.frechet_ratio:.2f}"
    logger.info(
        f"{trial.name}: {chosen}: latency {result.latency_ratio:.3f}, {result.size_mib:.2f} MiB, "
        f"error {result.errors_db[-1]:.1f} dB{measured}, {result.seconds:.0f} s"
    )


def describe(params: Params) -> str:
    """Return a trial's choices in a few words."""
    words = []
    if params["prune"] != NONE:
        amount = f"{params['blocks']} blocks" if "blocks" in params else f"{params['macs']:g} of the MACs"
        words.append(f"{params['prune']} to {amount}" if "macs" in params else f"without {amount}")
    if params["distill"] != NONE:
        words.append(params["distill"])
    if "solver" in params:
        words.append(f"{params['solver']} {params['steps']}{' searched' if params['searched'] else ''}")
        words += [f"cache {params['cache']:g}x"] if params["cache"] else []
    elif "few_steps" in params:
        words.append(f"{params['few_steps']} steps")
    bound = f" from {params['min_sqnr_db']:g} dB" if params.get("min_sqnr_db") else ""
    return ", ".join([*words, params["format"] + bound])


@contextmanager
def _quiet() -> Iterator[None]:
    """Show warnings only: a search has one line per trial."""
    package = logging.getLogger("diffpress")
    level = package.level
    package.setLevel(logging.WARNING)
    try:
        yield
    finally:
        package.setLevel(level)
