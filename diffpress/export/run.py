"""`diffpress compress`: run the stages, then export, measure and report.

    DIR/stages/               every finished stage
    DIR/checkpoint/           the final compressed checkpoint
    DIR/float/denoiser.onnx   the same network before quantization
    DIR/baseline/             bundle of the uncompressed model in fp32
    DIR/bundle/               the bundle to deploy
    DIR/latency.json          time per step of the quantized and the float graph in each engine, on this machine
    DIR/comparison.png        the teacher's images above, the bundle's below, from the same noise
    DIR/report.json, .html    gains and costs

(`export` may import `compress`, but not vice versa, so the command that needs both is here.)
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.compress.checkpoint import Checkpoint, save_checkpoint, write_folder
from diffpress.compress.config import EvaluateConfig, ExportConfig, GatesConfig
from diffpress.compress.evaluation.evaluate import evaluate, paired
from diffpress.compress.evaluation.features import load_features, load_reference
from diffpress.compress.evaluation.subject import print_evaluation
from diffpress.compress.models.counts import count
from diffpress.compress.pipeline import claim_folder, run_stages, trains
from diffpress.compress.quantization.algorithms.mixed_precision import check_bounds
from diffpress.compress.recipe import Recipe
from diffpress.compress.report import LATENCY, PICTURE, summary, write_report
from diffpress.compress.training import distributed
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.export.bundle import check_precision, check_targets, checked_engines, write_bundle
from diffpress.export.graph.model import Graph
from diffpress.export.graph.to_onnx import export_float
from diffpress.export.passes.fold_timesteps import fold_timesteps
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.targets.engine_cost import open_engine_costs
from diffpress.export.verify.latency import BATCH, Latency, float_variants, measure_latency
from diffpress.runtime.bundle import MANIFEST, Bundle, load_bundle
from diffpress.runtime.engines import Engine
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from diffpress.runtime.io.files import read_json, write_json
from diffpress.runtime.io.images import image_grid, to_uint8, write_png
from diffpress.runtime.network_inputs import ConditioningInputs, dummy_conditioning
from diffpress.runtime.pipeline import Pipeline

logger = logging.getLogger(__name__)

COLUMNS, LATENT_COLUMNS = 10, 4


def run_recipe(
    open_teacher: Callable[[], Checkpoint], recipe: Recipe, out: Path, *, update: bool = False, where: str = "recipe"
) -> None:
    """Run the recipe's stages, export, measure, report and check gates in `out`; resumes an unfinished run.

    `where` names the recipe in error messages.

    Raises:
        GateFailedError: If a gate failed, after everything is written.
    """
    with distributed.together():
        with distributed.main_first():
            teacher = open_teacher()
            check_recipe(recipe, teacher, where)
            if distributed.is_main():
                claim_folder(out, teacher, recipe, update)
        checkpoint = run_stages(teacher, recipe, out, open_engine_costs)
    if distributed.is_main():
        export_and_report(checkpoint, teacher, recipe, out)


def check_recipe(recipe: Recipe, teacher: Checkpoint, where: str) -> None:
    """Raise errors that would otherwise occur at the end, before any work is done."""
    if recipe.evaluate is not None:
        load_features(FEATURES, teacher.spec)
    for number, stage in enumerate(recipe.stages):
        if stage.name == "quantize":
            check_bounds(stage.config, teacher.spec, has_engines=True)
            if trains(stage) and stage.config.bounds and distributed.count() > 1:
                raise InvalidInputError(
                    f"{where}: stages[{number}]: quantize: mode qat with bounds depends on latencies that differ "
                    "between processes; run it with one process, which keeps stages that several processes finished"
                )
    quantized = any(stage.name == "quantize" for stage in recipe.stages)
    check_precision(recipe.export.precision, quantized, recipe.export.targets)
    check_targets(recipe.export.targets, recipe.export.tensorrt.compute_capabilities, recipe.export.tensorrt.options)


def export_and_report(checkpoint: Checkpoint, teacher: Checkpoint, recipe: Recipe, out: Path) -> None:
    """Export, measure, report and check gates.

    Raises:
        GateFailedError: If a gate failed, after everything is written.
    """
    targets = recipe.export.targets
    logger.info("[export]")
    save_checkpoint(checkpoint, out / "checkpoint")
    metrics, tensorrt_options = _metrics(teacher, recipe.export), _tensorrt_options(recipe.export)
    baseline = _done_before(out / "baseline", metrics) or _written(
        teacher, out / "baseline", targets, "teacher", metrics, **tensorrt_options
    )
    bundle = _student(checkpoint, teacher, recipe.export, out, baseline)
    with closing(Pipeline(bundle)) as student_pipeline, closing(Pipeline(baseline)) as teacher_pipeline:
        write_comparison(student_pipeline, teacher_pipeline, out / PICTURE)
        if recipe.evaluate is not None:
            logger.info("[evaluate]")
            scores = _evaluated(
                student_pipeline.denoiser, bundle, teacher_pipeline.denoiser, baseline, recipe.evaluate, out
            )
            write_json(out / "evaluation.json", scores)
    gates = evaluate_gates(recipe.gates, bundle, read_json(out / "evaluation.json") if recipe.evaluate else None)
    write_json(out / "gates.json", gates)
    logger.info(summary(write_report(out)))
    logger.info(f"bundle  {out / 'bundle'}\nreport  {out / 'report.html'}\nimages  {out / PICTURE}")
    failed = [f"{g['gate']} is {g['value']:.3f}, the bound is {g['bound']:g}" for g in gates if not g["passed"]]
    if failed:
        raise GateFailedError(f"{out}: gate failed: {'; '.join(failed)}. The work is kept")


def _student(checkpoint: Checkpoint, teacher: Checkpoint, config: ExportConfig, out: Path, baseline: Bundle) -> Bundle:
    """Write the bundle to deploy, the float graph, and the latency of int8 in each engine."""
    if checkpoint.quantization is None:
        (out / LATENCY).unlink(missing_ok=True)
    latencies = _stored_latencies(checkpoint, config, out)
    if latencies is not None and (out / "float").is_dir():
        found = _done_before(out / "bundle", _student_metrics(checkpoint, config, latencies))
        if found is not None:
            return found
    graph, original = _float_graph(checkpoint, out / "float"), checkpoint
    if config.fixed_timesteps:
        checkpoint, graph = fold_timesteps(checkpoint, graph)
    if latencies is None:
        latencies = _measured_latencies(checkpoint, graph, config)
        _store_latencies(latencies, original, config, out)
    for latency in latencies:
        logger.info(str(latency))
    old, new = count(teacher.model, teacher.spec), count(checkpoint.model, checkpoint.spec)
    metrics = _student_metrics(original, config, latencies)
    metrics |= {"parameters_ratio": new.parameters / old.parameters, "macs_ratio": new.macs / old.macs}
    variants = float_variants(graph, latencies) if config.revert_slower else []
    options = {"float_graph": graph, "variants": variants, "components_from": baseline, "precision": config.precision}
    return _written(
        checkpoint, out / "bundle", config.targets, "student", metrics, **options, **_tensorrt_options(config)
    )


def _stored_latencies(checkpoint: Checkpoint, config: ExportConfig, out: Path) -> list[Latency] | None:
    """Return the latencies that an earlier run measured for this checkpoint, None if there are none.

    Measuring again would give other numbers, and possibly another bundle.
    """
    if checkpoint.quantization is None:
        return []
    stored = read_json(out / LATENCY) if (out / LATENCY).is_file() else {}
    if not _graph_metrics(checkpoint, config).items() <= stored.items():
        return None
    return [Latency(row["engine"], row["precision"], row["float_ms"], row["quantized_ms"]) for row in stored["engines"]]


def _measured_latencies(checkpoint: Checkpoint, graph: Graph, config: ExportConfig) -> list[Latency]:
    assert checkpoint.quantization is not None
    rounded = insert_qdq(graph, checkpoint.quantization)
    return measure_latency(checkpoint, graph, dict.fromkeys(checked_engines(True, config.targets), rounded))


def _store_latencies(latencies: Sequence[Latency], checkpoint: Checkpoint, config: ExportConfig, out: Path) -> None:
    derived = ("latency_ratio", "slower")
    rows = [asdict(latency) | {key: getattr(latency, key) for key in derived} for latency in latencies]
    write_json(out / LATENCY, {**_graph_metrics(checkpoint, config), "batch": BATCH, "engines": rows})


def _metrics(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, Any]:
    tensorrt = {"tensorrt": config.tensorrt.model_dump(mode="json")} if "tensorrt" in config.targets else {}
    return {"checkpoint": checkpoint.hash, "targets": list(config.targets), **tensorrt}


def _tensorrt_options(config: ExportConfig) -> dict[str, Any]:
    """Return the build options of TensorRT engines as keyword arguments of `write_bundle`."""
    return {"capabilities": config.tensorrt.compute_capabilities, "build": config.tensorrt.options}


def _graph_metrics(checkpoint: Checkpoint, config: ExportConfig) -> dict[str, Any]:
    settings = {"fixed_timesteps": config.fixed_timesteps, "precision": config.precision}
    return _metrics(checkpoint, config) | settings


def _student_metrics(checkpoint: Checkpoint, config: ExportConfig, latencies: Sequence[Latency]) -> dict[str, Any]:
    reverted = [latency.engine for latency in latencies if latency.slower and config.revert_slower]
    return _graph_metrics(checkpoint, config) | {"reverted": reverted}


def _done_before(folder: Path, metrics: dict[str, Any]) -> Bundle | None:
    """Return the existing bundle if it was made with these metrics."""
    if not (folder / MANIFEST).is_file():
        return None
    found = load_bundle(folder)
    if not metrics.items() <= found.manifest["metrics"].items():
        return None
    logger.info(f"{folder}: done before")
    return found


def _written(
    checkpoint: Checkpoint, folder: Path, targets: Sequence[str], name: str, metrics: dict[str, Any], **options: Any
) -> Bundle:
    bundle = write_bundle(checkpoint, folder, targets, name=name, metrics=metrics, **options)
    for engine, row in running_parity(bundle).items():
        logger.info(
            f"{name}: {engine} against torch fp32: SQNR {row['sqnr_db']:.1f} dB, largest difference {row['max_abs']:g}"
        )
    return bundle


def running_parity(bundle: Bundle) -> dict[str, dict[str, float]]:
    """Return engine -> parity of the graph that the engine runs."""
    variants = bundle.manifest["graphs"]["denoiser"]["variants"]
    return bundle.manifest["parity"] | {e: entry["parity"] for e, entry in variants.items() if "parity" in entry}


def _float_graph(checkpoint: Checkpoint, folder: Path) -> Graph:
    graphs: list[Graph] = []
    write_folder(folder, lambda temporary: graphs.append(export_float(checkpoint, temporary / "denoiser.onnx")))
    return graphs[0]


def write_comparison(ours: Pipeline, theirs: Pipeline, path: Path) -> None:
    """Write the teacher's images above and the bundle's below, from the same noise and conditioning.

    Each pipeline uses its own sampling plan. There are two rows of each, and one short row for latent models, which may
    take minutes per image.
    """
    pixels = theirs.spec.is_pixel_space
    columns = COLUMNS if pixels else LATENT_COLUMNS
    count = 2 * columns if pixels else columns
    rows = []
    for pipeline in (theirs, ours):
        conditioning = _comparison_conditioning(pipeline, count)
        images = np.concatenate(list(pipeline.images(range(count), conditioning, batch=count)))
        rows.append(to_uint8(images, pipeline.spec.data_range))
    write_png(image_grid(np.concatenate(rows), columns=columns), path)


def _comparison_conditioning(pipeline: Pipeline, count: int) -> ConditioningInputs:
    """Return the first built-in prompts or the classes in turn; dummies without text encoders."""
    conditioning = pipeline.spec.conditioning
    if conditioning.kind == "text" and not conditioning.encoders:
        return dummy_conditioning(pipeline.spec, count)
    prompts = list(read_prompts(None)[:count]) if conditioning.kind == "text" else None
    return pipeline.conditions(count, prompts=prompts)


def _evaluated(
    ours: Engine, bundle: Bundle, theirs: Engine, baseline: Bundle, config: EvaluateConfig, out: Path
) -> dict[str, Any]:
    """Return both bundles' scores, each under its own plan; reuse stored scores if nothing changed."""
    key = {"bundle": bundle.hash, "baseline": baseline.hash, "config": config.model_dump(mode="json")}
    before = read_json(out / "evaluation.json") if (out / "evaluation.json").is_file() else {}
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
        print_evaluation(name, score)
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
