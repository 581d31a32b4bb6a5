"""Run a recipe's stages on a checkpoint.

Every finished stage is saved in DIR/stages under a key made of its input's hash and its settings. An interrupted run
therefore resumes, and a changed recipe redoes only what changed. What a stage does is in its entry of STAGES.
"""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from diffpress.compress.checkpoint import Checkpoint, Record, Source, save_checkpoint
from diffpress.compress.context import Context, Data, EngineCostsFactory
from diffpress.compress.evaluation.teacher_sqnr import teacher_sqnr_db
from diffpress.compress.models.components import component_names
from diffpress.compress.models.counts import count
from diffpress.compress.models.low_rank_layers import low_rank_layers
from diffpress.compress.recipe import Recipe
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.stages import LOW_RANK, SPARSITY, STAGES, Stage, check_order
from diffpress.compress.training import distributed
from diffpress.compress.training.captioned_images import has_captions, load_captioned_images
from diffpress.compress.training.sample_data import load_samples
from diffpress.compress.training.teacher_data import TeacherData, read_prompts
from diffpress.compress.workspace import Workspace, not_a_run
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json

logger = logging.getLogger(__name__)


def load_teacher(checkpoint: Checkpoint, recipe: Recipe) -> Checkpoint:
    """Return the model to distill from: the recipe's `teacher`, or else the checkpoint itself.

    Raises:
        InvalidInputError: The teacher cannot be loaded, or it differs from the checkpoint in its inputs, its samples or
            its other components.
    """
    if recipe.teacher is None:
        return checkpoint
    teacher = load_checkpoint(recipe.teacher)
    ours, theirs = _interface(checkpoint), _interface(teacher)
    for name, value in ours.items():
        if theirs[name] != value:
            difference = first_difference(value, theirs[name]).replace(" there, ", " in the checkpoint, ")
            raise InvalidInputError(
                f"teacher: {recipe.teacher}: has another {name} than the checkpoint "
                f"({difference.removesuffix(' here')} in the teacher)"
            )
    return teacher


def _interface(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what a student has in common with its teacher, as JSON; a distilled one may have a guidance input."""
    spec = checkpoint.spec.to_json()
    names = ("sample_shape", "data_range", "schedule", "latent_factor", "latent_scale", "latent_shift")
    conditioning = {name: value for name, value in spec["conditioning"].items() if name != "guidance_input"}
    common = {name.replace("_", " "): spec[name] for name in names}
    return common | {"conditioning": conditioning, "components": component_names(checkpoint)}


def check_start(checkpoint: Checkpoint, recipe: Recipe, where: str) -> None:
    """Raise InvalidInputError if a stage cannot come after what the checkpoint has gone through before the run."""
    distilled, is_quantized = checkpoint.spec.distilled, checkpoint.quantization is not None
    before = [f"distill: {{kind: {distilled}}}"] * bool(distilled) + ["quantize"] * is_quantized
    before += [SPARSITY] * bool(checkpoint.sparse_layers) + [LOW_RANK] * bool(low_rank_layers(checkpoint.model))
    check_order(recipe.stages, where, is_student=True, before=before)


def run_stages(
    checkpoint: Checkpoint,
    recipe: Recipe,
    out: Path,
    open_engine_costs: EngineCostsFactory | None = None,
    teacher: Checkpoint | None = None,
) -> Checkpoint:
    """Apply the recipe's stages to the checkpoint, reusing what `out`/stages already holds.

    With several processes, all of them train and the main one does the rest; the others load what it saved.
    `open_engine_costs` measures costs in an engine for the stages that need them (export/targets/engine_cost.py).
    `teacher` is what `load_teacher` returns, if it was loaded before.
    """
    workspace, source = Workspace(out), checkpoint.source
    teacher = teacher or load_teacher(checkpoint, recipe)
    data = open_data(teacher, recipe, workspace)
    for number, stage in enumerate(recipe.stages):
        logger.info(f"[{number + 1}/{len(recipe.stages)}] {stage.name}")
        key = stage_key(checkpoint, teacher, stage, recipe.seed, data)
        folder = workspace.stage(number, stage.name, key)
        done = folder.is_dir()
        distributed.wait()  # no process may write before all have looked
        if done:
            logger.info(f"done before, read from {folder}")
        elif distributed.is_main() or STAGES[stage.name].trains(stage.config):
            ctx = Context(
                recipe.seed,
                workspace.work(folder),
                teacher,
                data,
                open_engine_costs,
                shared=workspace.stages,
                logs=workspace.logs(folder),
            )
            checkpoint = run_stage(checkpoint, stage, folder, ctx)
        distributed.wait()
        if done or not distributed.is_main():
            checkpoint = load_checkpoint(reference_to(folder, source))
            shared = {name: getattr(source, name) for name in ("pipeline_folder", "decoder", "terms")}
            checkpoint = checkpoint.evolve(source=replace(checkpoint.source, **shared))
    return checkpoint


def open_data(teacher: Checkpoint, recipe: Recipe, workspace: Workspace) -> Data | None:
    """Return the recipe's samples; without any, samples of the teacher for models of latents or text."""
    spec, file = teacher.spec, recipe.data
    if spec.conditioning.kind == "text":
        if file is not None and has_captions(file):
            return load_captioned_images(file, teacher, workspace.stages)
        return TeacherData(teacher, recipe.teacher_samples, workspace.stages, read_prompts(file))
    if file is not None:
        return load_samples(file, spec)
    return None if spec.is_pixel_space else TeacherData(teacher, recipe.teacher_samples, workspace.stages)


def run_stage(checkpoint: Checkpoint, stage: Stage, folder: Path, ctx: Context) -> Checkpoint:
    """Run one stage; the main process adds its record to the history, saves it, and deletes the resume data."""
    began = time.monotonic()
    result = STAGES[stage.name].run(checkpoint, stage.config, ctx)
    if not distributed.is_main():
        return result
    before, after = count(checkpoint.model, checkpoint.spec), count(result.model, result.spec)
    changed: dict[str, Any] = {name: [getattr(before, name), getattr(after, name)] for name in ("parameters", "macs")}
    changed["plan"] = [_plan(checkpoint), _plan(result)]
    changed["teacher_sqnr_db"] = teacher_sqnr_db(result, ctx.teacher, ctx.data)
    changed |= ctx.notes
    if STAGES[stage.name].trains(stage.config) and distributed.count() > 1:
        changed["processes"] = distributed.count()  # each with batches of the configured size
    logger.info(
        f"parameters {before.parameters:,} -> {after.parameters:,}, MACs {before.macs:,} -> {after.macs:,}, "
        f"SQNR to the teacher {changed['teacher_sqnr_db']} dB"
    )
    record = Record(
        stage.name,
        stage.config.model_dump(mode="json"),
        ctx.seed,
        changed,
        checkpoint.hash,
        result.hash,
        round(time.monotonic() - began, 1),
    )
    result = result.evolve(history=(*checkpoint.history, record))
    save_checkpoint(result, folder)
    shutil.rmtree(ctx.work, ignore_errors=True)
    return result


def stage_key(checkpoint: Checkpoint, teacher: Checkpoint, stage: Stage, seed: int, data: Data | None) -> str:
    """Return the sha256 of everything that decides the stage's result."""
    facts = [
        checkpoint.hash,
        teacher.hash,
        stage.name,
        stage.config.model_dump(mode="json"),
        seed,
        data.hash if data else None,
    ]
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def reference_to(folder: Path, source: Source) -> str:
    """Return what `load_checkpoint` takes for a saved stage; a custom module needs its file again."""
    return f"{source.file}:{folder}" if source.file else str(folder)


def claim_folder(
    out: Path, checkpoint: Checkpoint, recipe: Recipe, update: bool, teacher: Checkpoint | None = None
) -> None:
    """Make `out` this run's folder; one that belongs to another run is refused and left as it is.

    `teacher` is what `load_teacher` returns; None for the checkpoint itself.
    """
    # teacher and data are compared by content, so that a project may be moved
    resolved = recipe.to_json()
    inputs = {"teacher": (teacher or checkpoint).hash, "data": sha256(recipe.data) if recipe.data else None}
    if recipe.teacher is not None:
        inputs["checkpoint"] = checkpoint.hash
    file, inputs_file = Workspace(out).recipe, Workspace(out).inputs
    if file.is_file() and not update:
        # without inputs.json, recipe.json holds the hashes itself
        before = read_json(file) | (read_json(inputs_file) if inputs_file.is_file() else {})
        difference = first_difference(before, resolved | inputs)
        if difference:
            raise InvalidInputError(
                f"{out}: was made by another recipe ({difference}); choose another --out, "
                "or pass --update to redo here only what changed"
            )
    elif not file.is_file() and out.exists() and (not out.is_dir() or set(out.iterdir()) - {Workspace(out).lock}):
        raise not_a_run(out)
    write_json(file, {key: value for key, value in resolved.items() if value is not None})
    write_json(inputs_file, inputs)


def first_difference(old: Any, new: Any, path: str = "") -> str:
    """Describe where two JSON values first differ; '' if they are equal."""
    if isinstance(old, dict) and isinstance(new, dict):
        pairs = [(old.get(key), new.get(key), f"{path}.{key}".lstrip(".")) for key in sorted({*old, *new})]
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        pairs = [(a, b, f"{path}[{i}]") for i, (a, b) in enumerate(zip(old, new, strict=True))]
    else:
        return "" if old == new else f"{path}: {_short(old)} there, {_short(new)} here"
    return next(filter(None, (first_difference(*pair) for pair in pairs)), "")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _plan(checkpoint: Checkpoint) -> str:
    plan = checkpoint.spec.plan
    return f"{plan.solver}-{plan.steps}"
