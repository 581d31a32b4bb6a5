"""Scores of a run's two bundles, and the gates that the result must pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.compress.config import EvaluateConfig, GatesConfig
from diffpress.compress.evaluation.evaluate import evaluate, paired
from diffpress.compress.evaluation.features import load_features, load_reference
from diffpress.compress.evaluation.subject import log_evaluation
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine
from diffpress.runtime.io.files import read_json, write_json

logger = logging.getLogger(__name__)


def evaluate_bundles(
    ours: Engine, bundle: Bundle, theirs: Engine, baseline: Bundle, config: EvaluateConfig, file: Path
) -> dict[str, Any]:
    """Score both bundles, each under its own plan, and store the scores in `file`; reuse them if nothing changed.

    Args:
        ours: Engine of the result.
        bundle: The result.
        theirs: Engine of the uncompressed model.
        baseline: Bundle of the uncompressed model.
        config: Number of samples and seeds.
        file: JSON file of the scores.

    Returns:
        {key, baseline, bundle}, where `key` is what the scores depend on.
    """
    key = {"bundle": bundle.hash, "baseline": baseline.hash, "config": config.model_dump(mode="json")}
    before = read_json(file) if file.is_file() else {}
    if before.get("key") == key:
        logger.info("done before")
        return dict(before)
    features = load_features(FEATURES, bundle.spec)
    reference = load_reference(REFERENCE, features, bundle.spec)
    scores = {}
    for name, engine, one in (("baseline", theirs, baseline), ("bundle", ours, bundle)):
        spec, what = one.spec_for(engine.name), f"sampling the {name}"
        scores[name] = evaluate(engine, spec, config, features, reference, what=what)
    scores["bundle"]["paired"] = paired(ours, theirs, bundle.spec_for(ours.name), config, "teacher, same plan")
    for name, score in scores.items():
        log_evaluation(name, score)
    write_json(file, {"key": key, **scores})
    return {"key": key, **scores}


def evaluate_gates(gates: GatesConfig, bundle: Bundle, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return each gate of the recipe with its bound, the measured value and whether it passed."""
    found = []
    if gates.frechet_ratio is not None and evaluation is not None:
        ratio = evaluation["bundle"]["frechet"]["mean"] / evaluation["baseline"]["frechet"]["mean"]
        found.append(("frechet_ratio", gates.frechet_ratio, ratio, ratio <= gates.frechet_ratio))
    if gates.parity_sqnr_db is not None:
        worst = min(row["sqnr_db"] for row in running_parity(bundle).values())
        found.append(("parity_sqnr_db", gates.parity_sqnr_db, worst, worst >= gates.parity_sqnr_db))
    return [{"gate": g, "bound": bound, "value": value, "passed": passed} for g, bound, value, passed in found]


def running_parity(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Return engine -> parity of the graph that the engine runs."""
    variants = bundle.manifest["graphs"]["denoiser"]["variants"]
    return bundle.manifest["parity"] | {e: entry["parity"] for e, entry in variants.items() if "parity" in entry}
