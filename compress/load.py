"""Anything a user may call a checkpoint -> `Checkpoint`: a folder, a hub id, or `file.py:weights`.

    folder with model_index.json or unet/     a diffusers pipeline; or the unet/ folder itself
    folder with diffpress.json                what a stage saved: config + widths + safetensors; or, written by
                                              hand, the `conditioning` (null label) and `plan` that no
                                              diffusers config can say
    owner/name                                a hub id, passed to diffusers' own download
    file.py:weights                           the file gives  load(path) -> (module, DenoiserSpec)

Weights come from safetensors only: nothing is ever unpickled.
"""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DModel
from safetensors import SafetensorError, safe_open
from torch import nn

from compress.checkpoint import FORMAT, RECORD, Checkpoint, Quantization, Record, Source
from compress.widths import apply_widths_, widths_of
from runtime.errors import BadInput
from runtime.schedule import flow_schedule, make_plan
from runtime.spec import Conditioning, DenoiserSpec, NoiseSchedule, conditioning_from_json

KINDS: dict[str, Any] = {"UNet2DModel": UNet2DModel}
PARTS = ("unet", "transformer")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
PREDICTIONS = {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"}
DEFAULT_STEPS = 50


def load_checkpoint(reference: str | Path) -> Checkpoint:
    """Load a checkpoint from a folder, a hub id or `file.py:weights`; every problem is a BadInput."""
    text = str(reference)
    custom = re.fullmatch(r"(.+\.py):(.+)", text)
    if custom:
        return _load_custom(Path(custom[1]), Path(custom[2]))
    path = Path(text)
    if path.is_dir():
        return _load_folder(path)
    if path.exists():
        raise BadInput(_not_a_folder(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        return _load_folder(_download(text))
    raise BadInput(f"{text}: no such checkpoint folder, and not a hub id of the form owner/name")


def _not_a_folder(path: Path) -> str:
    if path.suffix in PICKLES:
        return f"{path}: a pickle can run any code when read, so diffpress does not; convert it to safetensors first"
    return f"{path}: a checkpoint is a folder in diffusers' layout, a hub id, or file.py:weights"


def _download(hub_id: str) -> Path:
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # the hub client raises dozens of unrelated types
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise BadInput(f"{hub_id}: no such folder here, and the hub did not give it ({reason[:160]})") from error


# --- diffusers layout ------------------------------------------------------------------------------------------


def _load_folder(folder: Path) -> Checkpoint:
    record = _read_record(folder)
    if record is not None and record.get("kind") == "custom":
        raise BadInput(
            f"{folder}: made from a custom module; open it as FILE.py:{folder} with the file that defines it"
        )
    part = _denoiser_folder(folder)
    config = {k: v for k, v in _read_json(part / "config.json").items() if not k.startswith("_name_or_path")}
    kind = str(config.get("_class_name"))
    if kind not in KINDS:
        raise BadInput(
            f"{part / 'config.json'}: denoiser class '{kind}' is not known (known: {', '.join(KINDS)}); "
            "bring it as a custom module, file.py:weights"
        )
    try:
        model: nn.Module = KINDS[kind].from_config(config)
    except Exception as error:  # torch and diffusers raise many types for settings that make no sense
        raise BadInput(f"{part / 'config.json'}: {kind} cannot be built from it ({_line(error)})") from error
    scheduler_file = (part.parent if part.name in PARTS else folder) / "scheduler" / "scheduler_config.json"
    scheduler = _read_json(scheduler_file) if scheduler_file.is_file() else None
    source = Source(
        kind, config, scheduler, folder=part.name if part.name in PARTS else "unet", original=widths_of(model)
    )
    if record is not None and record.get("widths"):
        apply_widths_(model, record["widths"], str(folder / RECORD))
        _refresh_(model)
    _load_weights_(model, _weight_files(part))
    if record is not None and "spec" in record:
        spec = DenoiserSpec.from_json(record["spec"], f"{folder / RECORD}: spec")
    else:
        spec = _spec_of(config, scheduler, scheduler_file, part / "config.json")
        spec = _amended(spec, record or {}, str(folder / RECORD))
    return Checkpoint(model.eval(), spec, source, *_history_and_scales(record, folder))


def _denoiser_folder(folder: Path) -> Path:
    for candidate in (*(folder / part for part in PARTS), folder):
        if (candidate / "config.json").is_file():
            return candidate
    raise BadInput(f"{folder}: no unet/ or transformer/ with a config.json in it, and no config.json itself")


def _weight_files(part: Path) -> list[Path]:
    index = part / "diffusion_pytorch_model.safetensors.index.json"
    if index.is_file():
        names = _read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise BadInput(f"{index}: has no weight_map of tensor names to files; copy it again")
        return [part / name for name in sorted(set(names.values()))]
    plain = part / "diffusion_pytorch_model.safetensors"
    found = [plain] if plain.is_file() else sorted(part.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = sorted(p.name for p in part.iterdir() if p.suffix in PICKLES)
    if pickles and not found:
        raise BadInput(
            f"{part}: has only {pickles[0]}; a pickle can run any code when read, so diffpress does not: "
            "save it as safetensors first (model.save_pretrained)"
        )
    count = f"several ({', '.join(p.name for p in found)})" if found else "no"
    raise BadInput(f"{part}: {count} weight files; diffusion_pytorch_model.safetensors is expected")


def _load_weights_(model: nn.Module, files: list[Path]) -> None:
    """Copy safetensors into the module tensor by tensor (float32), checking names, shapes and finiteness."""
    state = model.state_dict()
    missing = set(state)
    for file in files:
        try:
            with safe_open(file, framework="pt") as tensors:
                for name in tensors.keys():
                    if name not in state:
                        raise BadInput(f"{file}: tensor '{name}' does not belong to this model; a foreign checkpoint?")
                    tensor = tensors.get_tensor(name)
                    if tensor.shape != state[name].shape:
                        raise BadInput(
                            f"{file}: tensor '{name}' has shape {list(tensor.shape)}, "
                            f"the config asks for {list(state[name].shape)}"
                        )
                    if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                        raise BadInput(
                            f"{file}: tensor '{name}' holds NaN or infinite values; the checkpoint is broken"
                        )
                    state[name].copy_(tensor)
                    missing.discard(name)
        except (SafetensorError, OSError) as error:
            raise BadInput(f"{file}: not readable as safetensors ({error}); truncated? copy it again") from error
    if missing:
        raise BadInput(f"{files[0]}: tensor '{sorted(missing)[0]}' is missing ({len(missing)} in all)")


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
            clip=spec.plan.clip,
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise BadInput(f"{where}: plan needs solver and steps, and may have grid and guidance ({error!r})") from error
    return spec.with_plan(plan)


def _spec_of(config: dict[str, Any], scheduler: dict[str, Any] | None, where: Path, config_file: Path) -> DenoiserSpec:
    scheduler = scheduler or {}
    flow = "FlowMatch" in str(scheduler.get("_class_name", ""))
    kind = str(scheduler.get("prediction_type", "epsilon"))
    if not flow and kind not in PREDICTIONS:
        raise BadInput(f"{where}: prediction_type '{kind}' is not one of {', '.join(PREDICTIONS)}")
    try:
        steps = int(scheduler.get("num_train_timesteps", 1000))
        size = config.get("sample_size") or 32
        height, width = (size, size) if isinstance(size, int) else (int(side) for side in size)
        classes = int(config.get("num_class_embeds") or 0)
        channels = int(config.get("in_channels", 3))
    except (TypeError, ValueError) as error:
        raise BadInput(f"{config_file}, {where}: a size in them is not a whole number ({_line(error)})") from error
    # diffusers counts a flow's time in T-ths up to T itself: T + 1 timesteps
    schedule = flow_schedule(steps + 1) if flow else _schedule_of(scheduler, where)
    return DenoiserSpec(
        prediction="flow" if flow else PREDICTIONS[kind],
        schedule=schedule,
        sample_shape=(channels, height, width),
        plan=make_plan("ddim", min(DEFAULT_STEPS, steps), schedule, clip=bool(scheduler.get("clip_sample", True))),
        conditioning=Conditioning("class", classes) if classes else Conditioning(),
    )


def _schedule_of(scheduler: dict[str, Any], where: Path) -> NoiseSchedule:
    try:
        # Any scheduler of the beta family is one table; diffusers itself makes it from the config.
        table = DDPMScheduler.from_config(scheduler).alphas_cumprod.double().numpy()
    except Exception as error:  # torch's and diffusers' own types for settings that make no sense
        raise BadInput(f"{where}: no noise schedule can be made from it ({_line(error)})") from error
    return NoiseSchedule(tuple(np.sqrt(table).tolist()), tuple(np.sqrt(1.0 - table).tolist()))


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
        _load_weights_(module, [weights / "weights.safetensors"])
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
            amax = {name: tensors.get_tensor(name) for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise BadInput(f"{file}: the scales cannot be read ({error}); quantize again") from error
    for name, value in amax.items():
        if not torch.isfinite(value).all() or (value <= 0).any():
            raise BadInput(f"{file}: scale '{name}' is zero, negative or not finite; quantize again")
    return history, Quantization(str(record["quantization"]["format"]), amax)


def _read_record(folder: Path) -> dict[str, Any] | None:
    file = folder / RECORD
    if not file.is_file():
        return None
    record = _read_json(file)
    if record.get("format", FORMAT) != FORMAT:
        raise BadInput(f"{file}: checkpoint format {record['format']!r}, this diffpress reads {FORMAT}")
    return record


def _line(error: BaseException) -> str:
    """The first line of a message: some libraries write pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def _refresh_(model: nn.Module) -> None:
    from compress.adapters import adapter_for

    adapter_for(model).refresh_(model)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BadInput(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise BadInput(f"{path}: expected a JSON object")
    return data
