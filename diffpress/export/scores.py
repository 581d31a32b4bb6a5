"""Scores of a run's two bundles, and the gates that the result must pass."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from diffpress.compress.config import EVALUATE_FILES, EvaluateConfig, GatesConfig
from diffpress.compress.evaluation.evaluate import evaluate, open_features, open_reference, paired, unscored
from diffpress.compress.evaluation.prompt_adherence import prompt_adherence
from diffpress.compress.evaluation.subject import pipeline_subject
from diffpress.compress.evaluation.summary import log_evaluation
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.export.comparison import PAIRED_WITH
from diffpress.export.verify.gate import failures_of
from diffpress.runtime.bundle import Bundle, sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


def check_evaluation(config: EvaluateConfig, gates: GatesConfig, spec: DenoiserSpec, where: str) -> None:
    """Raise InvalidInputError for what `evaluate_bundles` or `evaluate_gates` would refuse at the end of a run."""
    features = open_features(config, spec)
    if features is None and gates.frechet_ratio is not None:
        raise InvalidInputError(
            f"{where}: gates.frechet_ratio needs features of the model's images; name an ONNX image encoder as "
            "evaluate.features"
        )
    prompts: list[str] = []
    if spec.conditioning.kind == "text":
        texts = read_prompts(config.prompts)
        if spec.conditioning.encoders:
            prompts = [texts[i % len(texts)] for i in range(config.samples)]
    elif config.prompts is not None:
        raise InvalidInputError(f"{where}: evaluate.prompts: the model is not conditioned on text; remove it")
    if features is not None:
        prompt_adherence(prompts, features, config.candidates)


def evaluate_bundles(ours: Pipeline, theirs: Pipeline, config: EvaluateConfig, file: Path) -> dict[str, Any]:
    """Score both bundles, each under its own plan, and store the scores in `file`; reuse them if nothing changed.

    Args:
        ours: The result.
        theirs: The uncompressed model.
        config: Number of samples and seeds, features.
        file: JSON file of the scores.

    Returns:
        {key, baseline, bundle}, where `key` is what the scores depend on.
    """
    key = {"bundle": ours.bundle.hash, "baseline": theirs.bundle.hash, "config": config.model_dump(mode="json")}
    named: list[Path] = [path for path in (getattr(config, name) for name in EVALUATE_FILES) if path is not None]
    if named:
        key["files"] = [sha256(path) if path.is_file() else str(sorted(path.iterdir())) for path in named]
    before = read_json(file) if file.is_file() else {}
    if before.get("key") == key:
        logger.info("done before")
        return dict(before)
    texts = read_prompts(config.prompts) if ours.spec.conditioning.kind == "text" else ()
    bundle, baseline = pipeline_subject(ours, texts), pipeline_subject(theirs, texts)
    features = open_features(config, bundle.spec)
    scores = {name: unscored(config.samples, config.seeds) for name in ("baseline", "bundle")}
    if features is not None:
        reference = open_reference(config, features, bundle.spec, baseline, "the uncompressed model")
        for name, subject in (("baseline", baseline), ("bundle", bundle)):
            scores[name] = evaluate(subject, config, features, reference, what=f"sampling the {name}")
    scores["bundle"]["paired"] = paired(bundle, baseline, config, PAIRED_WITH)
    for name, score in scores.items():
        log_evaluation(name, score)
    write_json(file, {"key": key, **scores})
    return {"key": key, **scores}


def evaluate_gates(gates: GatesConfig, bundle: Bundle, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return each gate of the recipe with its bound, the measured value and whether it passed."""
    found = []
    if gates.frechet_ratio is not None and evaluation is not None:
        ours, theirs = (evaluation[name]["frechet"] for name in ("bundle", "baseline"))
        # a distance below that of real images to each other means no more than that one
        ratio = max(ours["mean"], ours["floor"]) / max(theirs["mean"], theirs["floor"])
        found.append(("frechet_ratio", gates.frechet_ratio, ratio, ratio <= gates.frechet_ratio))
    rows = [{"gate": g, "bound": bound, "value": value, "passed": passed} for g, bound, value, passed in found]
    return [*rows, *_parity_gates(gates.parity_sqnr_db, bundle)]


def _parity_gates(bound: float | None, bundle: Bundle) -> list[dict[str, Any]]:
    """Return the recipe's parity gate, and what failed the export's own bounds, each with its message as `reason`."""
    failures, rows = failures_of(bundle), []
    if bound is not None:
        others = {failure.engine for failure in failures if not failure.target}
        parity = running_parity(bundle)
        worst = min((row["sqnr_db"] for engine, row in parity.items() if engine not in others), default=None)
        passed = worst is not None and worst >= bound
        row = {"gate": "parity_sqnr_db", "bound": bound, "value": worst, "passed": passed}
        rows.append(row if worst is not None else row | {"reason": "was not measured: no engine gave finite samples"})
    return rows + [
        {
            "gate": "parity_sqnr_db",
            "bound": failure.required_db,
            "value": failure.sqnr_db,
            "passed": False,
            "reason": failure.message,
        }
        for failure in failures
        if failure.target and (failure.sqnr_db is None or failure.required_db != bound)
    ]


def running_parity(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Return engine -> parity of the graph that the engine runs."""
    variants = bundle.manifest["graphs"]["denoiser"]["variants"]
    return bundle.manifest["parity"] | {e: entry["parity"] for e, entry in variants.items() if "parity" in entry}
