"""A folder in diffusers' layout -> Checkpoint."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from torch import nn

from diffpress.compress.checkpoint import RECORD, Checkpoint, Source
from diffpress.compress.context import say
from diffpress.compress.models.adapter import ADAPTERS, adapter_for
from diffpress.compress.models.widths import apply_widths_, widths_of
from diffpress.compress.sources.layout import (
    DENOISERS,
    Layout,
    first_line,
    load_weights_,
    read_json,
    read_layout,
    weight_files,
)
from diffpress.compress.sources.record import history_and_scales, read_record
from diffpress.compress.sources.scheduler_config import read_scheduler
from diffpress.runtime.conditioning import conditioning_from_json
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampling_plan import SamplingPlan, make_plan
from diffpress.runtime.solvers import with_solver
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.timesteps import spaced_timesteps


def load_diffusers_folder(folder: Path, dtype: torch.dtype) -> Checkpoint:
    record = read_record(folder)
    if record is not None and record.get("kind") == "custom":
        raise InvalidInputError(
            f"{folder}: made from a custom module; open it as FILE.py:{folder} with the file that defines it"
        )
    layout = read_layout(folder)
    if layout.ignored:
        say(f"{folder}: {', '.join(layout.ignored)} not needed for sampling, left out")
    model = _built(layout)
    part = layout.denoiser.name if layout.denoiser.name in DENOISERS else None
    scheduler_file = (layout.denoiser.parent if part else folder) / "scheduler" / "scheduler_config.json"
    scheduler = read_json(scheduler_file) if scheduler_file.is_file() else None
    source = Source(
        layout.kind,
        layout.config,
        scheduler,
        folder=part or "unet",
        original=widths_of(model),
        parts=folder if layout.configs else None,
    )
    if record is not None and record.get("widths"):
        apply_widths_(model, record["widths"], str(folder / RECORD))
        adapter_for(model).refresh_(model)
    load_weights_(model, weight_files(layout.denoiser), dtype)
    if record is not None and "spec" in record:
        spec = DenoiserSpec.from_json(record["spec"], f"{folder / RECORD}: spec")
    else:
        spec = _amended(_spec_of(layout, scheduler, scheduler_file), record or {}, str(folder / RECORD))
    return Checkpoint(model.eval(), spec, source, *history_and_scales(record, folder))


def _built(layout: Layout) -> nn.Module:
    """The denoiser's module without weights: its parameters are on the meta device, its computed tables are real."""
    where = layout.denoiser / "config.json"
    if layout.kind not in ADAPTERS:
        of = f" of a {layout.pipeline}" if layout.pipeline else ""
        raise InvalidInputError(
            f"{where}: denoiser class '{layout.kind}'{of} is not known (known: {', '.join(ADAPTERS)}); "
            "bring it as a custom module, file.py:weights"
        )
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = getattr(diffusers, layout.kind).from_config(layout.config)
    except Exception as error:  # torch and diffusers raise many types for settings that make no sense
        raise InvalidInputError(f"{where}: {layout.kind} cannot be built from it ({first_line(error)})") from error
    return module


def _spec_of(layout: Layout, scheduler: dict[str, Any] | None, scheduler_file: Path) -> DenoiserSpec:
    where = layout.denoiser / "config.json"
    try:
        found = ADAPTERS[layout.kind].describe(layout)
        latent = _latent(layout, found.sample_shape[0])
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInputError(
            f"{where}: an entry in it is missing or makes no sense ({first_line(error)})"
        ) from error
    # a whole pipeline says how it wants to be sampled; a bare denoiser gets what suits it
    follow = bool(latent) or found.conditioning.kind == "text"
    # a DDIMPipeline too; a DDPMPipeline would take a thousand random steps
    follow |= bool(layout.index) and (scheduler or {}).get("_class_name") == "DDIMScheduler"
    facts = read_scheduler(scheduler, scheduler_file, follow, found.own_sigmas)
    if facts.note:
        say(f"{scheduler_file}: {facts.note}")
    spec = DenoiserSpec(
        prediction=facts.prediction,
        schedule=facts.schedule,
        sample_shape=found.sample_shape,
        plan=SamplingPlan("ddim", (0.0,)),
        conditioning=found.conditioning,
        size_multiple=found.size_multiple,
        spacing=facts.spacing,
        **latent,
    )
    steps = min(found.steps, len(facts.schedule))
    plan = SamplingPlan(
        facts.solver,
        spaced_timesteps(facts.spacing, steps, facts.schedule, spec.tokens(spec.sample_shape)),
        guidance=found.guidance,
        clip=facts.clip and spec.is_pixel_space,
        end=facts.end,
        start=facts.start,
        threshold=facts.threshold,
    )
    return spec.with_plan(plan)


def _latent(layout: Layout, channels: int) -> dict[str, Any]:
    """Scale, shift and factor of a latent space, from its decoder's config; nothing for a model of pixels."""
    part = layout.decoder
    if part is None:
        return {}
    config = layout.configs[part]
    if int(config["latent_channels"]) != channels:
        raise InvalidInputError(
            f"{layout.folder}: the denoiser works on {channels} latent channels, {part} decodes "
            f"{config['latent_channels']}; they do not belong together"
        )
    return {
        "latent_scale": float(config.get("scaling_factor") or 1.0),
        "latent_shift": float(config.get("shift_factor") or 0.0),
        "latent_factor": 2 ** (len(config["block_out_channels"]) - 1),
    }


def _amended(spec: DenoiserSpec, record: dict[str, Any], where: str) -> DenoiserSpec:
    """What a hand-written diffpress.json says that no diffusers config can: the null label, the plan."""
    if "conditioning" in record:
        spec = replace(spec, conditioning=conditioning_from_json(record["conditioning"], where))
    wish = record.get("plan")
    if wish is None:
        return spec
    try:
        plan = make_plan(
            wish["solver"],
            int(wish["steps"]),
            spec.schedule,
            spacing=wish.get("spacing", wish.get("grid", "trailing")),
            guidance=float(wish.get("guidance", 1.0)),
            clip=with_solver(spec.plan, wish["solver"]).clip,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInputError(
            f"{where}: plan needs solver and steps, and may have grid and guidance ({error!r})"
        ) from error
    return spec.with_plan(plan)
