"""`diffpress compress`: stages, then everything a deployment and a reader want of them.

    DIR/stages/               every finished stage
    DIR/checkpoint/           the final compressed checkpoint
    DIR/float/denoiser.onnx   the same network before quantization
    DIR/baseline/             a bundle of the uncompressed model in fp32
    DIR/bundle/               what to deploy
    DIR/comparison.png        teacher above, bundle below, same noise
    DIR/report.json, .html    what it gained and cost

(`export` may import `compress`, not the other way round: that is why the verb that needs both lives here.)
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from compress.builtin import FEATURES, REFERENCE
from compress.checkpoint import Checkpoint, save_checkpoint, write_folder
from compress.commands import add_recipe_arguments, loaded, print_evaluation
from compress.config import EvaluateConfig, GatesConfig
from compress.context import say
from compress.counts import count
from compress.evaluate import evaluate, load_features, load_reference, paired
from compress.pipeline import claim_folder, run_stages
from compress.recipe import Recipe, read_recipe
from compress.report import PICTURE, summary, write_report
from compress.teacher_data import read_prompts
from export.bundle import write_bundle
from export.graph import Graph
from export.to_onnx import export_float
from runtime.bundle import MANIFEST, Bundle, load_bundle
from runtime.denoise import Conditions, stand_in_conditions
from runtime.engines import Engine
from runtime.errors import GateFailed
from runtime.files import read_json, write_json
from runtime.images import grid, to_uint8, write_png
from runtime.pipeline import Pipeline

COLUMNS, LATENT_COLUMNS = 10, 4


def add_compress_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--update", action="store_true", help="redo in DIR what a changed recipe changes")


def compress_command(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe, tuple(args.set))
    teacher = loaded(args)
    if recipe.evaluate is not None:
        load_features(FEATURES, teacher.spec)  # what cannot be scored is refused before the work, not after it
    claim_folder(args.out, teacher, recipe, args.update)
    checkpoint = run_stages(teacher, recipe, args.out)
    deliver(checkpoint, teacher, recipe, args.out)
    return 0


def deliver(checkpoint: Checkpoint, teacher: Checkpoint, recipe: Recipe, out: Path) -> None:
    """Export, measure, report and judge; raises GateFailed last, when everything is written."""
    targets = recipe.export.targets
    print("[export]", flush=True)
    save_checkpoint(checkpoint, out / "checkpoint")
    baseline = _bundle(teacher, out / "baseline", targets, "teacher")
    bundle = _bundle(checkpoint, out / "bundle", targets, "student", out / "float", teacher, baseline)
    with closing(Pipeline(bundle)) as ours, closing(Pipeline(baseline)) as theirs:
        write_comparison(ours, theirs, out / PICTURE)
        if recipe.evaluate is not None:
            print("[evaluate]", flush=True)
            scores = _evaluated(ours.denoiser, bundle, theirs.denoiser, baseline, recipe.evaluate, out)
            write_json(out / "evaluation.json", scores)
    gates = judged(recipe.gates, bundle, read_json(out / "evaluation.json") if recipe.evaluate else None)
    write_json(out / "gates.json", gates)
    print(summary(write_report(out)))
    failed = [f"{g['gate']} is {g['value']:.3f}, the bound is {g['bound']:g}" for g in gates if not g["passed"]]
    if failed:
        raise GateFailed(f"{out}: gate failed: {'; '.join(failed)}. The work is kept")


def _bundle(
    checkpoint: Checkpoint,
    folder: Path,
    targets: Sequence[str],
    name: str,
    float_folder: Path | None = None,
    teacher: Checkpoint | None = None,
    parts_from: Bundle | None = None,
) -> Bundle:
    """The checkpoint's bundle; one that is there already, from the same checkpoint for the same targets, is kept."""
    metrics: dict[str, Any] = {"checkpoint": checkpoint.hash, "targets": list(targets)}
    if (folder / MANIFEST).is_file() and (float_folder is None or float_folder.is_dir()):
        found = load_bundle(folder)
        if metrics.items() <= found.manifest["metrics"].items():
            say(f"{folder}: done before")
            return found
    if teacher is not None:
        old, new = count(teacher.model, teacher.spec), count(checkpoint.model, checkpoint.spec)
        metrics |= {"parameters_ratio": new.parameters / old.parameters, "macs_ratio": new.macs / old.macs}
    graph = None if float_folder is None else _float_graph(checkpoint, float_folder)
    bundle = write_bundle(
        checkpoint, folder, targets, name=name, float_graph=graph, metrics=metrics, parts_from=parts_from
    )
    for engine, row in bundle.manifest["parity"].items():
        say(f"{name}: {engine} against torch fp32: SQNR {row['sqnr_db']:.1f} dB, largest difference {row['max_abs']:g}")
    return bundle


def _float_graph(checkpoint: Checkpoint, folder: Path) -> Graph:
    graphs: list[Graph] = []
    write_folder(folder, lambda temporary: graphs.append(export_float(checkpoint, temporary / "denoiser.onnx")))
    return graphs[0]


def write_comparison(ours: Pipeline, theirs: Pipeline, path: Path) -> None:
    """The teacher's images above, the bundle's below, each by its own plan from the same noise and words.

    Two rows of each, and one short row from models of latents, which may take minutes an image.
    """
    pixels = theirs.spec.is_pixel_space
    columns = COLUMNS if pixels else LATENT_COLUMNS
    count = 2 * columns if pixels else columns
    rows = []
    for pipeline in (theirs, ours):
        told = _told(pipeline, count)
        images = np.concatenate(list(pipeline.images(range(count), told, batch=count)))
        rows.append(to_uint8(images, pipeline.spec.data_range))
    write_png(grid(np.concatenate(rows), columns=columns), path)


def _told(pipeline: Pipeline, count: int) -> Conditions:
    """The first built-in prompts, or the classes in turn; stand-ins for a denoiser without its text encoders."""
    conditioning = pipeline.spec.conditioning
    if conditioning.kind == "text" and not conditioning.encoders:
        return stand_in_conditions(pipeline.spec, count)
    prompts = list(read_prompts(None)[:count]) if conditioning.kind == "text" else None
    return pipeline.conditions(count, prompts=prompts, warn=say)


def _evaluated(
    ours: Engine, bundle: Bundle, theirs: Engine, baseline: Bundle, config: EvaluateConfig, out: Path
) -> dict[str, Any]:
    """Both bundles' scores, each by its own plan; kept from before where nothing changed."""
    key = {"bundle": bundle.hash, "baseline": baseline.hash, "config": config.model_dump(mode="json")}
    before = read_json(out / "evaluation.json") if (out / "evaluation.json").is_file() else {}
    if before.get("key") == key:
        say("done before")
        return dict(before)
    features = load_features(FEATURES, bundle.spec)
    reference = load_reference(REFERENCE, features, bundle.spec)
    scores = {}
    for name, engine, one in (("baseline", theirs, baseline), ("bundle", ours, bundle)):
        scores[name] = evaluate(engine, one.spec, config, features, reference, what=f"sampling the {name}")
    scores["bundle"]["paired"] = paired(ours, theirs, bundle.spec, config, "teacher, same plan")
    for name, score in scores.items():
        print_evaluation(name, score)
    return {"key": key, **scores}


def judged(gates: GatesConfig, bundle: Bundle, evaluation: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Each gate of the recipe with its bound, the measured value and whether it was passed."""
    found = []
    if gates.frechet_ratio is not None and evaluation is not None:
        ratio = evaluation["bundle"]["frechet"]["mean"] / evaluation["baseline"]["frechet"]["mean"]
        found.append(("frechet_ratio", gates.frechet_ratio, ratio, ratio <= gates.frechet_ratio))
    if gates.parity_sqnr_db is not None:
        worst = min(row["sqnr_db"] for row in bundle.manifest["parity"].values())
        found.append(("parity_sqnr_db", gates.parity_sqnr_db, worst, worst >= gates.parity_sqnr_db))
    return [{"gate": g, "bound": bound, "value": value, "passed": passed} for g, bound, value, passed in found]
