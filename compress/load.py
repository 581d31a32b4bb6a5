"""Anything a user may call a checkpoint -> `Checkpoint`: a folder, one file, a hub id, or `file.py:weights`.

    folder with model_index.json or unet/     a diffusers pipeline; or the unet/ folder itself
    folder with diffpress.json                what a stage saved: config + widths + safetensors; or, written by
                                              hand, the `conditioning` (null label) and `plan` that no
                                              diffusers config can say
    file.safetensors                          a finetune in one file, where diffusers can read it
    owner/name                                a hub id, passed to diffusers' own download
    file.py:weights                           the file gives  load(path) -> (module, DenoiserSpec)

Weights come from safetensors only, and are streamed: nothing is ever unpickled, and nothing held twice. Only the
denoiser is read here; text encoders and decoders stay on disk until they are run or exported (compress/parts.py).
"""

from __future__ import annotations

import atexit
import importlib.util
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import torch
from accelerate import init_empty_weights
from safetensors import SafetensorError, safe_open
from torch import nn

from compress.adapters import ADAPTERS, adapter_for
from compress.checkpoint import FORMAT, RECORD, TENSOR_KINDS, Checkpoint, Quantization, Record, Source
from compress.context import say
from compress.layout import (
    DENOISERS,
    PICKLES,
    Layout,
    first_line,
    load_weights_,
    read_json,
    read_layout,
    weight_files,
)
from compress.pipelines import downloaded, from_single_file, fused
from compress.scheduler import read_scheduler
from compress.widths import apply_widths_, widths_of
from runtime.conditioning import conditioning_from_json
from runtime.errors import BadInput
from runtime.schedule import make_plan, spaced_timesteps
from runtime.solvers import with_solver
from runtime.spec import DenoiserSpec, Plan


def load_checkpoint(
    reference: str | Path,
    *,
    loras: Sequence[str] = (),
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Load a checkpoint from a folder, a file, a hub id or `file.py:weights`; every problem is a BadInput.

    `loras` are fused into a pipeline's weights, 'PATH' or 'PATH:scale' each; `config` is a pipeline folder that says
    how a single file is built; the denoiser's weights are held as `dtype`.
    """
    text = str(reference)
    custom = re.fullmatch(r"(.+\.py):(.+)", text)
    if custom:
        if loras:
            raise BadInput(f"{text}: a LoRA can be fused into a diffusers pipeline, not into a custom module")
        return _load_custom(Path(custom[1]), Path(custom[2]))
    folder = _folder_of(text, config)
    return _load_folder(fused(folder, loras, _scratch()) if loras else folder, dtype)


def _folder_of(text: str, config: str | None) -> Path:
    path = Path(text)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return from_single_file(path, _scratch(), config)
    if path.exists():
        raise BadInput(_not_a_folder(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        return downloaded(text)
    raise BadInput(f"{text}: no such checkpoint folder, and not a hub id of the form owner/name")


def _not_a_folder(path: Path) -> str:
    if path.suffix in PICKLES:
        return f"{path}: a pickle can run any code when read, so diffpress does not; convert it to safetensors first"
    return f"{path}: a checkpoint is a folder in diffusers' layout, a hub id, a .safetensors file, or file.py:weights"


def _scratch() -> Path:
    """A place for a converted pipeline; it goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="diffpress-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "pipeline"


# --- diffusers layout ------------------------------------------------------------------------------------------


def _load_folder(folder: Path, dtype: torch.dtype) -> Checkpoint:
    record = _read_record(folder)
    if record is not None and record.get("kind") == "custom":
        raise BadInput(
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
    return Checkpoint(model.eval(), spec, source, *_history_and_scales(record, folder))


def _built(layout: Layout) -> nn.Module:
    """The denoiser's module without weights: its parameters are on the meta device, its computed tables are real."""
    where = layout.denoiser / "config.json"
    if layout.kind not in ADAPTERS:
        of = f" of a {layout.pipeline}" if layout.pipeline else ""
        raise BadInput(
            f"{where}: denoiser class '{layout.kind}'{of} is not known (known: {', '.join(ADAPTERS)}); "
            "bring it as a custom module, file.py:weights"
        )
    try:
        with init_empty_weights(include_buffers=False):
            module: nn.Module = getattr(diffusers, layout.kind).from_config(layout.config)
    except Exception as error:  # torch and diffusers raise many types for settings that make no sense
        raise BadInput(f"{where}: {layout.kind} cannot be built from it ({first_line(error)})") from error
    return module


def _spec_of(layout: Layout, scheduler: dict[str, Any] | None, scheduler_file: Path) -> DenoiserSpec:
    where = layout.denoiser / "config.json"
    try:
        found = ADAPTERS[layout.kind].describe(layout)
        latent = _latent(layout, found.sample_shape[0])
    except (KeyError, TypeError, ValueError) as error:
        raise BadInput(f"{where}: an entry in it is missing or makes no sense ({first_line(error)})") from error
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
        plan=Plan("ddim", (0.0,)),
        conditioning=found.conditioning,
        size_multiple=found.size_multiple,
        spacing=facts.spacing,
        **latent,
    )
    steps = min(found.steps, len(facts.schedule))
    plan = Plan(
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
        raise BadInput(
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
            grid=wish.get("grid", "trailing"),
            guidance=float(wish.get("guidance", 1.0)),
            clip=with_solver(spec.plan, wish["solver"]).clip,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{where}: plan needs solver and steps, and may have grid and guidance ({error!r})") from error
    return spec.with_plan(plan)


# --- custom modules --------------------------------------------------------------------------------------------


def _load_custom(file: Path, weights: Path) -> Checkpoint:
    if not file.is_file():
        raise BadInput(f"{file}: no such file; a custom module is given as file.py:weights")
    if not weights.exists():
        raise BadInput(f"{weights}: no such weights for {file}")
    saved = weights.is_dir() and (weights / RECORD).is_file()
    record = _read_record(weights) if saved else None
    original = next(iter(sorted(weights.glob("original*"))), weights) if saved else weights
    module, spec = _call_load(file, original)
    where = str(weights)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise BadInput(f"{original}: tensor '{name}' holds NaN or infinite values; the checkpoint is broken")
    source = Source("custom", file=file, weights=original, original=widths_of(module))
    if record is not None:
        apply_widths_(module, record.get("widths", {}), where)
        load_weights_(module, [weights / "weights.safetensors"])
        spec = DenoiserSpec.from_json(record.get("spec"), f"{weights / RECORD}: spec")
    return Checkpoint(module.eval(), spec, source, *_history_and_scales(record, weights))


def _call_load(file: Path, weights: Path) -> tuple[nn.Module, DenoiserSpec]:
    definition = importlib.util.spec_from_file_location(f"diffpress_custom_{file.stem}", file)
    if definition is None or definition.loader is None:
        raise BadInput(f"{file}: cannot be imported")
    code = importlib.util.module_from_spec(definition)
    try:
        definition.loader.exec_module(code)
        result = code.load(weights)
    except (Exception, SystemExit) as error:  # the user's own code may raise anything
        raise BadInput(f"{file}: load({weights}) failed: {type(error).__name__}: {error}") from error
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], nn.Module)
        and isinstance(result[1], DenoiserSpec)
    ):
        raise BadInput(f"{file}: load(path) must return (torch.nn.Module, DenoiserSpec)")
    return result[0].float(), result[1]


# --- what diffpress.json adds ----------------------------------------------------------------------------------


def _history_and_scales(record: dict[str, Any] | None, folder: Path) -> tuple[tuple[Record, ...], Quantization | None]:
    if record is None:
        return (), None
    try:
        history = tuple(Record(**entry) for entry in record.get("history", []))
    except TypeError as error:
        raise BadInput(f"{folder / RECORD}: history cannot be read ({error})") from error
    if not record.get("quantization"):
        return history, None
    file = folder / "quantization.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: the scales cannot be read ({error}); quantize again") from error
    for name, value in found.items():
        signed = name.startswith("branch.")
        if not torch.isfinite(value).all() or (not signed and (value <= 0).any()):
            raise BadInput(f"{file}: scale '{name}' is zero, negative or not finite; quantize again")
        if name.partition(".")[0] not in TENSOR_KINDS:
            raise BadInput(f"{file}: '{name}' is no scale of this diffpress; quantize again")
    facts = record["quantization"]
    kinds = {kind: _under(found, kind) for kind in TENSOR_KINDS}
    return history, Quantization(str(facts["format"]), formats=dict(facts.get("formats", {})), **kinds)


def _under(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")}


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.is_file():
        return None
    record = read_json(file)
    if record.get("format", FORMAT) != FORMAT:
        raise BadInput(f"{file}: checkpoint format {record['format']!r}, this diffpress reads {FORMAT}")
    return record
