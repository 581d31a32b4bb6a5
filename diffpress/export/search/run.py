"""`diffpress search`: run the search in a folder, export and rescore its front, and name the chosen bundle.

search.json  study.journal  latencies.json  trials/NAME.yaml  stages/  baseline/
front.json  front/NAME/{recipe.yaml, bundle/}  chosen/{recipe.yaml, bundle/}  search.png
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import EvaluateConfig, GatesConfig
from diffpress.compress.effort import PASSES, measure_cost
from diffpress.compress.pipeline import first_difference
from diffpress.compress.search.proxies import LatencyTable, compared_samples
from diffpress.compress.search.run import Searcher, run_search, run_trial
from diffpress.compress.search.selection import (
    check_features,
    fits_builtin,
    open_selection,
    selecting_network,
    split_prompts,
)
from diffpress.compress.search.settings import SearchSettings
from diffpress.compress.search.space import space_of
from diffpress.compress.search.study import Study
from diffpress.compress.training.sample_data import load_samples
from diffpress.export.scores import check_evaluation
from diffpress.export.search.finish import finish
from diffpress.export.search.trial_engine import open_trial_engine
from diffpress.runtime.bundle import sha256
from diffpress.runtime.engines import available
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.io.files import read_json, write_json, write_text

logger = logging.getLogger(__name__)

FILES = ("features", "reference", "select_features", "select_reference", "data", "prompts")
SEARCH, STUDY, LATENCIES, PROMPTS = "search.json", "study.journal", "latencies.json", "prompts.txt"
SEARCH_SHARE = 0.8  # of the time; the rest exports and scores the front
TRAINING_SHARE = 0.05  # of the time that one training stage at its full budget may take
STEPS_BATCH = 16
REPORTED_SEEDS = 3
LEAST_STEPS, DEFAULT_STEPS, MOST_STEPS = 30, 200, 3000


def training_steps(checkpoint: Checkpoint, seconds: float | None) -> int:
    """Return the optimizer steps of a training stage at its full budget, from the time of the whole search."""
    if seconds is None:
        return DEFAULT_STEPS
    each = PASSES * STEPS_BATCH * measure_cost(checkpoint).seconds
    return int(min(max(TRAINING_SHARE * seconds / each, LEAST_STEPS), MOST_STEPS))


def recorded_training_steps(out: Path) -> int | None:
    """Return the training steps of the search in this folder; None if there is none."""
    file = out / SEARCH
    return int(read_json(file)["settings"]["train_steps"]) if file.is_file() else None


def search(
    checkpoint: Checkpoint,
    settings: SearchSettings,
    out: Path,
    *,
    trials: int | None,
    seconds: float | None,
    show: Callable[[str], None] = logger.info,
) -> dict[str, Any]:
    """Search recipes for the checkpoint in `out`, or resume there; return the content of front.json.

    Args:
        checkpoint: The model to compress, which is the teacher as well.
        settings: Bounds, engine and seed.
        out: The search's folder.
        trials: Number of trials, those of earlier runs included; None for no limit.
        seconds: Time of the whole search, of which SEARCH_SHARE is for trials; None for no limit.
        show: Receives the table of the result.

    Raises:
        InvalidInputError: The settings do not fit the model, or the folder belongs to another search.
        GateFailedError: Nothing keeps the bounds; the front is written all the same.
    """
    spec = checkpoint.spec
    if settings.engine not in available():
        raise MissingDependencyError(settings.engine, settings.engine, f"--engine {settings.engine}")
    check_features(settings, spec)
    selecting, reporting = split_prompts(settings, spec)
    if settings.data is not None and spec.conditioning.kind != "text":
        load_samples(settings.data, spec)
    space = space_of(checkpoint, settings.train_steps, selecting_network(settings, spec) is None)
    _claim(out, checkpoint, settings)
    if reporting:
        write_text(out / PROMPTS, "\n".join(reporting) + "\n")
    config = _reporting_config(settings, out / PROMPTS if reporting else None)
    if settings.features is not None or fits_builtin(spec):
        check_evaluation(config, GatesConfig(), spec, "search")
    study = Study(out / STUDY, space, settings.seed)
    latencies = LatencyTable(out / LATENCIES, settings.engine, checkpoint.hash)
    with open_trial_engine(checkpoint, settings.engine, settings.threads, selecting) as engine:
        logger.info("[search]")
        selection = open_selection(settings, spec, engine.teacher)
        samples = compared_samples(checkpoint, selecting)
        searcher = Searcher(checkpoint, settings, space, out, engine, latencies, selection, samples, selecting)
        budget = None if seconds is None else SEARCH_SHARE * seconds
        found = run_search(study, partial(run_trial, searcher), trials, budget)
    return finish(searcher, found, config, show)


def _reporting_config(settings: SearchSettings, prompts: Path | None) -> EvaluateConfig:
    return EvaluateConfig(
        samples=settings.samples,
        seeds=REPORTED_SEEDS,
        features=settings.features,
        reference=settings.reference,
        prompts=prompts,
    )


def _claim(out: Path, checkpoint: Checkpoint, settings: SearchSettings) -> None:
    """Make `out` this search's folder; InvalidInputError if it belongs to another one or holds something else."""
    file = out / SEARCH
    values = settings.model_dump(mode="json", exclude=set(FILES))  # files are compared by content
    hashes = {name: sha256(path) for name in FILES if (path := getattr(settings, name)) is not None and path.is_file()}
    facts = {"checkpoint": checkpoint.hash, "settings": values, "files": hashes}
    if not file.is_file():
        # a latency table that was recorded elsewhere may be there
        if out.exists() and (not out.is_dir() or any(path.name != LATENCIES for path in out.iterdir())):
            raise InvalidInputError(f"{out}: exists and is not a folder of a search; choose another --out")
        write_json(file, facts)
        return
    difference = first_difference(read_json(file), facts)
    if difference:
        raise InvalidInputError(f"{out}: was made by another search ({difference}); choose another --out")
