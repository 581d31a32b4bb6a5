"""LoRAs fused into a pipeline's weights: W' = W + sum_i scale_i * (alpha_i / rank_i) * B_i A_i."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import RECORD, write_folder
from diffpress.compress.sources.layout import INDEX, PICKLES, first_line, read_json
from diffpress.compress.sources.tensor_shapes import tensor_shapes
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError

LORA_FILE = "pytorch_lora_weights.safetensors"
# The first of each pair of low-rank factors, as diffusers, peft, kohya and XLabs name it.
LORA_PAIR = re.compile(r"lora\d?(_A|_down|\.down|_linear_layer\.down)\b")


def fused(folder: Path, loras: Sequence[str], into: Path) -> Path:
    """Write the pipeline in `folder` with LoRAs, each PATH or PATH:SCALE, added to its weights (float32) into `into`.

    Only the parts that LoRAs touch are loaded; the others are copied as they are. Raises InvalidInputError for a LoRA that is
    not there, is a pickle, or does not fit in full, and MissingDependencyError without peft.
    """
    wanted = [parse_lora(text) for text in loras]
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("peft", "compress", "--lora")
    if not (folder / INDEX).is_file():
        raise InvalidInputError(f"{folder}: has no {INDEX}; --lora needs a whole pipeline folder")
    index = read_json(folder / INDEX)
    pipe, parts = _lora_components(folder, index)
    names = [f"lora_{number}" for number in range(len(wanted))]
    for name, (file, _) in zip(names, wanted, strict=True):
        _add_lora_(pipe, parts, file, name)
    touched: dict[str, Any] = {
        part: model for part, model in parts.items() if any(_layers(model, name) for name in names)
    }
    pipe.set_adapters(names, [scale for _, scale in wanted])
    pipe.fuse_lora(components=list(touched), adapter_names=names)
    pipe.unload_lora_weights()

    def fill(temporary: Path) -> None:
        for name in (INDEX, RECORD, *index):
            source = folder / name
            if source.is_file():
                shutil.copyfile(source, temporary / name)
            elif name in touched:
                touched[name].save_pretrained(temporary / name)
            elif source.is_dir():
                shutil.copytree(source, temporary / name)

    write_folder(into, fill)
    return into


def parse_lora(text: str) -> tuple[Path, float]:
    """'PATH' or 'PATH:SCALE' -> the safetensors file and its scale (1 where none is given); colons in PATH are fine."""
    head, _, tail = text.rpartition(":")
    try:
        path, scale = (Path(head), float(tail)) if head and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        path, scale = Path(text), 1.0
    if not math.isfinite(scale):
        raise InvalidInputError(f"--lora {text}: the scale is not a finite number")
    if path.suffix in PICKLES:
        raise InvalidInputError(
            f"{path}: a pickle can run any code when read, so diffpress does not; save it as safetensors"
        )
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        within = f"has no {LORA_FILE}; name the file in it" if path.is_dir() else "no such file"
        raise InvalidInputError(f"{path}: {within} (a LoRA is given as PATH or PATH:SCALE, SCALE a number)")
    return file, scale


def _lora_components(folder: Path, index: dict[str, Any]) -> tuple[Any, dict[str, nn.Module]]:
    """The pipeline with nothing but the parts that its class lets a LoRA change, and those parts."""
    import diffusers

    kind = str(index.get("_class_name"))
    loadable = getattr(getattr(diffusers, kind, None), "_lora_loadable_modules", None)
    if not loadable:
        raise InvalidInputError(f"{folder}: diffusers loads no LoRA into a {kind}; leave out --lora")
    absent = {name: None for name, value in index.items() if isinstance(value, list) and name not in loadable}
    try:
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **absent
        )
        pipe.to(torch.float32)
    except Exception as error:  # torch, transformers and diffusers raise many types for a folder that does not fit
        raise InvalidInputError(f"{folder}: diffusers cannot load this {kind} ({first_line(error)})") from error
    parts = {name: getattr(pipe, name, None) for name in loadable}
    return pipe, {name: part for name, part in parts.items() if isinstance(part, nn.Module)}


def _add_lora_(pipe: Any, parts: dict[str, nn.Module], file: Path, name: str) -> None:
    pairs = sum(bool(LORA_PAIR.search(key)) for key in tensor_shapes(file))
    if not pairs:
        raise InvalidInputError(f"{file}: holds no LoRA (no lora_A or lora_down tensors); another kind of file?")
    try:
        with _quiet_transformers():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, use_safetensors=True)
    except Exception as error:  # diffusers, peft and torch each have their own
        raise InvalidInputError(
            f"{file}: does not fit {type(pipe).__name__}, a LoRA of another model? ({first_line(error)})"
        ) from error
    # diffusers only logs what it leaves out; it may split a pair (fused q, k, v), so there can be more but never fewer
    layers = sum(_layers(model, name) for model in parts.values())
    if layers < pairs:
        raise InvalidInputError(
            f"{file}: only {layers} of its {pairs} layers are in this {type(pipe).__name__}; a LoRA of another model?"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Without its report of 'newly initialized' weights: those that the LoRA does not have, which in truth are kept."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _layers(model: nn.Module, adapter: str) -> int:
    return sum(adapter in getattr(module, "lora_A", ()) for module in model.modules())
