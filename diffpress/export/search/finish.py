"""The end of a search: bundles of its front, rescored once with the features that report, and the chosen one.

Latencies of the bundles are measured in one run, in alternation with the teacher's; Frechet distances in the features,
noise and prompts that report. What was selected by is kept beside it, so that both can be compared.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.evaluate import evaluate, open_features, open_reference
from diffpress.compress.evaluation.subject import pipeline_subject
from diffpress.compress.pipeline import run_stages
from diffpress.compress.recipe import Recipe
from diffpress.compress.search.front import constrained_front, spread_out, violation
from diffpress.compress.search.picture import write_picture
from diffpress.compress.search.run import Searcher, describe, recipe_text
from diffpress.compress.search.selection import fits_builtin
from diffpress.compress.search.study import Trial
from diffpress.compress.search.summary import nearest_line, table
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.compress.workspace import Workspace
from diffpress.export.run_bundles import baseline_bundle, result_bundle
from diffpress.export.verify.gate import failures_of
from diffpress.runtime.benchmarking.bench import bundle_subject, machine, measure
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import GateFailedError
from diffpress.runtime.io.files import atomic_folder, link_or_copy, write_json, write_text
from diffpress.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)

FRONT_LIMIT = 6  # bundles that are exported and scored
BATCH, REPEATS = 8, 5
REPORTED = ("samples", "seeds", "features", "reference")  # what is repeated of the teacher's scores
FRONT, CHOSEN, PICTURE = "front.json", "chosen", "search.png"


def finish(
    searcher: Searcher, trials: Sequence[Trial], config: EvaluateConfig, show: Callable[[str], None]
) -> dict[str, Any]:
    """Export and rescore the front of the trials, write everything, show the table; return what front.json holds.

    Raises:
        GateFailedError: No trial could be run, or nothing keeps the bounds.
    """
    chosen = front_of(searcher, trials)
    if not chosen:
        raise GateFailedError(
            f"{searcher.out}: none of {len(trials)} trials could be run; the first one: "
            f"{trials[0].result.failure if trials else 'there was no time for any, give more'}"
        )
    logger.info("[front]")
    baseline, bundles = _exported(searcher, chosen)
    timed = _latency_ratios(searcher, baseline, bundles)
    scores = _scores(searcher, baseline, bundles, config)
    members = [
        _member(searcher, trial, bundle, timed[number], scores)
        for number, (trial, bundle) in enumerate(zip(chosen, bundles, strict=True))
    ]
    bounds = searcher.settings.bounds
    kept = [member for member in members if member["meets_bounds"]]
    best = min(kept, key=lambda member: member["latency_ratio"], default=None)
    facts: dict[str, Any] = {
        "bounds": bounds.model_dump(),
        "engine": searcher.settings.engine,
        "chosen": None if best is None else best["name"],
        "teacher": {"frechet": scores["baseline"]["frechet"]} if scores else None,
        "reporting": None if not scores else {key: scores["baseline"][key] for key in REPORTED},
        "selecting": None if searcher.selection is None else _selecting(searcher),
        "machine": machine(),
        "trials": len(trials),
        "front": members,
    }
    write_json(searcher.out / FRONT, facts)
    write_picture(searcher.out / PICTURE, facts, trials)
    show(table(members, facts["chosen"]))
    if best is None:
        raise GateFailedError(f"{searcher.out}: {nearest_line(members, bounds)}. The work is kept")
    _copy_chosen(searcher.out, best["name"])
    show(f"chosen  {searcher.out / CHOSEN / 'bundle'}\nfront   {searcher.out / FRONT}")
    return facts


def front_of(searcher: Searcher, trials: Sequence[Trial]) -> list[Trial]:
    """Return at most FRONT_LIMIT trials of the front, fastest first; the nearest one if none keeps the bounds.

    With features, only trials whose distance was measured count.
    """
    measured = [
        trial
        for trial in trials
        if not trial.result.failure and (searcher.selection is None or trial.result.frechet_ratio is not None)
    ]
    values = [(trial.result.latency_ratio, trial.result.size_mib, trial.result.quality) for trial in measured]
    found = constrained_front(measured, values, [trial.result.excesses or {} for trial in measured])
    return spread_out(found, [trial.result.latency_ratio for trial in found], FRONT_LIMIT)


def _exported(searcher: Searcher, chosen: Sequence[Trial]) -> tuple[Bundle, list[Bundle]]:
    """Return the teacher's bundle and those of the trials; those of an earlier run are kept."""
    bundles, baseline = [], None
    for trial in chosen:
        folder = searcher.out / "front" / trial.name
        write_text(folder / "recipe.yaml", recipe_text(searcher, trial.params))
        recipe = Recipe.load(folder / "recipe.yaml")
        export = recipe.export.model_copy(update={"threads": searcher.settings.threads})
        baseline = baseline or baseline_bundle(searcher.teacher, export, Workspace(searcher.out))
        checkpoint = run_stages(searcher.teacher, recipe, searcher.out, None, searcher.teacher)
        bundles.append(result_bundle(checkpoint, searcher.teacher, export, Workspace(folder), baseline))
    assert baseline is not None
    return baseline, bundles


def _latency_ratios(searcher: Searcher, baseline: Bundle, bundles: Sequence[Bundle]) -> list[dict[str, float]]:
    """Time an image of each bundle and of the teacher's, in alternation."""
    options = EngineOptions(threads=searcher.settings.threads)
    with ExitStack() as stack:
        subjects = []
        for number, bundle in enumerate((baseline, *bundles)):
            engine = stack.enter_context(closing(open_engine(bundle, searcher.settings.engine, options=options)))
            subjects.append(bundle_subject(bundle, engine, name=str(number), options=options))
        first, *rows = measure(subjects, [BATCH], REPEATS)["rows"]
    return [
        {
            "latency_ratio": row["image_ms"] / first["image_ms"],
            "image_ms": row["image_ms"],
            "teacher_image_ms": first["image_ms"],
            "integer_mac_share": row["integer_mac_share"],
        }
        for row in rows
    ]


def _scores(
    searcher: Searcher, baseline: Bundle, bundles: Sequence[Bundle], config: EvaluateConfig
) -> dict[str, dict[str, Any]]:
    """Return the scores of the teacher as `baseline` and of each bundle by its hash; empty without features."""
    spec = searcher.teacher.spec
    if config.features is None and not fits_builtin(spec):
        return {}
    features = open_features(config, spec, searcher.settings.threads)
    assert features is not None
    texts = read_prompts(config.prompts) if spec.conditioning.kind == "text" else ()
    found: dict[str, dict[str, Any]] = {}
    options = EngineOptions(threads=searcher.settings.threads)
    with closing(Pipeline(baseline, searcher.settings.engine, options=options)) as pipeline:
        teacher = pipeline_subject(pipeline, texts)
        reference = open_reference(config, features, spec, teacher, "the uncompressed model")
        found["baseline"] = evaluate(teacher, config, features, reference, "scoring the teacher")
    for bundle in bundles:
        with closing(Pipeline(bundle, searcher.settings.engine, options=options)) as pipeline:
            subject = pipeline_subject(pipeline, texts)
            found[bundle.hash] = evaluate(subject, config, features, reference, f"scoring {bundle.path.parent.name}")
    return found


def _member(
    searcher: Searcher, trial: Trial, bundle: Bundle, timed: dict[str, float], scores: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    frechet = ratio = None
    if scores:
        frechet, theirs = scores[bundle.hash]["frechet"], scores["baseline"]["frechet"]
        # as gates.frechet_ratio: below the distance of real images to each other nothing is meaningful
        ratio = max(frechet["mean"], frechet["floor"]) / max(theirs["mean"], theirs["floor"])
    size, folder = trial.result.size_mib, Path("front") / trial.name
    excesses = searcher.settings.bounds.excesses(timed["latency_ratio"], ratio, size)
    failures = [failure.message for failure in failures_of(bundle) if failure.target]
    return {
        "name": trial.name,
        "choices": describe(trial.params),
        **timed,
        "size_mib": size,
        "bundle_mib": sum(entry["bytes"] for entry in bundle.manifest["files"].values()) / 2**20,
        "frechet": frechet,
        "frechet_ratio": ratio,
        "selected_by": {
            "latency_ratio": trial.result.latency_ratio,
            "frechet_ratio": trial.result.frechet_ratio,
            "error_db": trial.result.errors_db[-1],
            "teacher_sqnr_db": trial.result.teacher_sqnr_db,
        },
        "meets_bounds": violation(excesses) == 0.0 and not failures,
        "excesses": excesses,
        "parity_failures": failures,
        "recipe": str(folder / "recipe.yaml"),
        "bundle": str(folder / "bundle"),
    }


def _selecting(searcher: Searcher) -> dict[str, Any]:
    selection = searcher.selection
    assert selection is not None
    return {
        "features": {"name": selection.features.name, "sha256": selection.features.sha256},
        "samples": selection.config.samples,
        "teacher_frechet": selection.teacher,
        "floor": selection.floor,
    }


def _copy_chosen(out: Path, name: str) -> None:
    """Make `chosen/` a copy of the member: hard links where the file system has them."""
    member = out / "front" / name
    with atomic_folder(out / CHOSEN, "choose another --out") as folder:
        shutil.copytree(member / "bundle", folder / "bundle", copy_function=link_or_copy)
        shutil.copyfile(member / "recipe.yaml", folder / "recipe.yaml")
