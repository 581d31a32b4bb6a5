"""Load a checkpoint from a folder in the diffusers layout."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from diffpress.compress.checkpoint import RECORD, Checkpoint, Source
from diffpress.compress.models.adapter import ADAPTERS
from diffpress.compress.models.widths import widths_of
from diffpress.compress.sources.latent_space import read_latent_space
from diffpress.compress.sources.layout import (
    DENOISERS,
    INDEX,
    Layout,
    first_line,
    read_layout,
)
from diffpress.compress.sources.pipeline_settings import read_settings
from diffpress.compress.sources.pipelines import PIXEL_PIPELINES
from diffpress.compress.sources.pretrained import quiet_libraries
from diffpress.compress.sources.record import read_record, recorded_fields, resize_
from diffpress.compress.sources.scheduler_config import read_scheduler
from diffpress.compress.sources.terms import read_terms
from diffpress.compress.sources.weights import load_weights_, weight_files
from diffpress.runtime.carried_settings import with_solver
from diffpress.runtime.conditioning import conditioning_from_json
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


def load_diffusers_folder(folder: Path, dtype: torch.dtype) -> Checkpoint:
    """Load a pipeline folder, a bare denoiser folder, or a saved checkpoint; weights are held as `dtype`.

    The spec comes from diffpress.json if it holds one, else from the denoiser's and the scheduler's configs.

    Raises:
        InvalidInputError: The folder, its configs or its weights cannot be used.
    """
    record = read_record(folder)
    if record is not None and record.get("kind") == "custom":
        raise InvalidInputError(
            f"{folder}: saved from a custom module; load it as FILE.py:{folder} with the file that defines the module"
        )
    layout = read_layout(folder)
    model = _build_empty(layout)
    scheduler, scheduler_file = _scheduler_of(layout)
    source = Source(
        layout.kind,
        layout.config,
        scheduler,
        folder=layout.denoiser.name if layout.denoiser.name in DENOISERS else "unet",
        original=widths_of(model),
        pipeline_folder=folder if layout.configs else _shared_pipeline(folder, record),
        terms=read_terms(folder) | (read_terms(folder.parent) if folder.name in DENOISERS else {}),
    )
    spec = _recorded_spec(folder, record) or _spec_of(layout, model, scheduler, scheduler_file, _chooses_plan(record))
    if record is not None and "spec" not in record:
        spec = _apply_record(spec, record, str(folder / RECORD))
    if layout.ignored:
        logger.info(f"{folder}: {', '.join(layout.ignored)} not needed for sampling, left out")
    resize_(model, record, folder)
    load_weights_(model, weight_files(layout.denoiser), dtype)
    return Checkpoint(model.eval(), spec, source, **recorded_fields(record, folder, model))


def _shared_pipeline(folder: Path, record: dict[str, Any] | None) -> Path | None:
    """Return the folder whose other components a checkpoint uses, relative to its own; None if it names none."""
    named = (record or {}).get("pipeline")
    if named is None:
        return None
    shared = folder / str(named)
    if not (shared / INDEX).is_file():
        raise InvalidInputError(f"{folder / RECORD}: pipeline: {shared} has no {INDEX}; put the pipeline there")
    return shared.resolve()


def spec_of_folder(folder: Path) -> DenoiserSpec:
    """Return the spec that `load_diffusers_folder` would give the checkpoint, without reading any weight."""
    record = read_record(folder)
    recorded = _recorded_spec(folder, record)
    if recorded is not None:
        return recorded
    layout = read_layout(folder)
    spec = _spec_of(layout, _build_empty(layout), *_scheduler_of(layout), _chooses_plan(record))
    return _apply_record(spec, record or {}, str(folder / RECORD))


def _recorded_spec(folder: Path, record: dict[str, Any] | None) -> DenoiserSpec | None:
    if record is None or "spec" not in record:
        return None
    return DenoiserSpec.from_json(record["spec"], f"{folder / RECORD}: spec")


def _scheduler_of(layout: Layout) -> tuple[dict[str, Any] | None, Path]:
    """Return the scheduler's config, None if there is none, and the file it is or would be in."""
    beside = layout.denoiser.parent if layout.denoiser.name in DENOISERS else layout.folder
    file = beside / "scheduler" / "scheduler_config.json"
    return (read_json(file, hint="") if file.is_file() else None), file


def _build_empty(layout: Layout) -> nn.Module:
    """Build the denoiser without weights: parameters on the meta device, buffers materialized."""
    where = layout.denoiser / "config.json"
    if layout.kind not in ADAPTERS:
        of = f" of a {layout.pipeline}" if layout.pipeline else ""
        raise InvalidInputError(
            f"{where}: denoiser class '{layout.kind}'{of} is not supported (supported: {', '.join(ADAPTERS)}); "
            "load it as a custom module, file.py:weights"
        )
    try:
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            module: nn.Module = getattr(diffusers, layout.kind).from_config(layout.config)
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(f"{where}: {layout.kind} cannot be built from it ({first_line(error)})") from error
    _warn_of_unknown_entries(type(module), layout.config, where)
    return module


def _warn_of_unknown_entries(kind: type[nn.Module], config: dict[str, Any], where: Path) -> None:
    """Warn of entries that diffusers ignores, of which it prints a paragraph itself."""
    known = set(inspect.signature(kind).parameters)
    unknown = [name for name in config if name not in known and not name.startswith("_")]
    if unknown:
        logger.warning(f"{where}: {kind.__name__} has no {', '.join(map(repr, unknown))}; ignored, as diffusers does")


def _chooses_plan(record: dict[str, Any] | None) -> bool:
    return bool((record or {}).get("plan"))


def _spec_of(
    layout: Layout, model: nn.Module, scheduler: dict[str, Any] | None, scheduler_file: Path, plan_chosen: bool
) -> DenoiserSpec:
    settings = read_settings(layout, model, scheduler)
    complete, where = settings.layout, layout.denoiser / "config.json"
    try:
        found = ADAPTERS[layout.kind].describe(complete)
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(f"{where}: an entry is missing or invalid ({first_line(error)})") from error
    latent = read_latent_space(settings, found.sample_shape[0])
    if scheduler is None:
        logger.warning(
            f"{where}: without {scheduler_file} the model is assumed to predict epsilon on DDPM's linear noise "
            "schedule; if it was trained otherwise, put the scheduler_config.json of its training there"
        )
    # a pixel-space pipeline is sampled with DDIM unless it has a DDIM scheduler: DDPM takes 1000 stochastic steps
    pixels = complete.pipeline in PIXEL_PIPELINES
    own_ddim = bool(layout.index) and (settings.scheduler or {}).get("_class_name") == "DDIMScheduler"
    with quiet_libraries():
        follow = not pixels or own_ddim
        facts = read_scheduler(settings.scheduler, scheduler_file, follow, found.pipeline_sigmas, plan_chosen)
    if facts.note:
        logger.info(f"{scheduler_file}: {facts.note}")
    spec = DenoiserSpec(
        prediction=facts.prediction,
        schedule=facts.schedule,
        sample_shape=found.sample_shape,
        plan=SamplingPlan("ddim", (0.0,)),
        conditioning=found.conditioning,
        size_multiple=found.size_multiple,
        spacing=facts.spacing,
        solver_settings=facts.solver_settings,
        **latent,
    )
    steps = min(found.steps, len(facts.schedule))
    plan = SamplingPlan(
        facts.solver,
        (0.0,),
        guidance=found.guidance,
        clip=facts.clip,
        end=facts.end,
        start=facts.start,
        threshold=facts.threshold,
    )
    return spec.with_plan(plan.spaced(facts.spacing, steps, facts.schedule, spec.tokens(spec.sample_shape)))


def _apply_record(spec: DenoiserSpec, record: dict[str, Any], where: str) -> DenoiserSpec:
    """Apply a hand-written diffpress.json: the null label and the plan, which diffusers configs cannot express."""
    if "conditioning" in record:
        spec = replace(spec, conditioning=conditioning_from_json(record["conditioning"], where))
    entry = record.get("plan")
    if entry is None:
        return spec
    try:
        plan = make_plan(
            entry["solver"],
            int(entry["steps"]),
            spec.schedule,
            spacing=entry.get("spacing", entry.get("grid", "trailing")),
            guidance=float(entry.get("guidance", 1.0)),
            clip=with_solver(spec, entry["solver"]).clip,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(
            f"{where}: plan must have solver and steps, and may have spacing and guidance ({error!r})"
        ) from error
    return spec.with_plan(plan)
