"""Fuse LoRAs into a pipeline's weights: W' = W + sum_i scale_i * (alpha_i / rank_i) * B_i A_i."""

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
from diffpress.compress.sources.layout import INDEX, PICKLES, first_line
from diffpress.compress.sources.tensor_shapes import tensor_shapes
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.io.files import read_json

LORA_FILE = "pytorch_lora_weights.safetensors"
# The first of each pair of low-rank factors, as diffusers, peft, kohya and XLabs name it.
LORA_PAIR = re.compile(r"lora\d?(_A|_down|\.down|_linear_layer\.down)\b")


def fuse_loras(folder: Path, loras: Sequence[str], into: Path) -> Path:
    """Fuse LoRAs into the pipeline in `folder` (float32) and write the result to `into`.

    Only the components that the LoRAs modify are loaded; the others are copied unchanged.

    Args:
        folder: Pipeline folder.
        loras: LoRAs, each PATH or PATH:SCALE.
        into: Output folder.

    Raises:
        InvalidInputError: A LoRA is missing, is a pickle, or does not match the pipeline completely.
        MissingDependencyError: peft is not installed.
    """
    adapters = [parse_lora(text) for text in loras]
    if importlib.util.find_spec("peft") is None:
        raise MissingDependencyError("peft", "compress", "--lora")
    if not (folder / INDEX).is_file():
        raise InvalidInputError(f"{folder}: has no {INDEX}; --lora needs a complete pipeline folder")
    index = read_json(folder / INDEX, hint="")
    pipe, components = _lora_components(folder, index)
    names = [f"lora_{number}" for number in range(len(adapters))]
    for name, (file, _) in zip(names, adapters, strict=True):
        _add_lora_(pipe, components, file, name)
    modified: dict[str, Any] = {
        component: model for component, model in components.items() if any(_layer_count(model, name) for name in names)
    }
    pipe.set_adapters(names, [scale for _, scale in adapters])
    pipe.fuse_lora(components=list(modified), adapter_names=names)
    pipe.unload_lora_weights()

    def fill(temporary: Path) -> None:
        for name in (INDEX, RECORD, *index):
            source = folder / name
            if source.is_file():
                shutil.copyfile(source, temporary / name)
            elif name in modified:
                modified[name].save_pretrained(temporary / name)
            elif source.is_dir():
                shutil.copytree(source, temporary / name)

    write_folder(into, fill)
    return into


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse 'PATH' or 'PATH:SCALE' into the safetensors file and its scale (default 1); PATH may contain colons."""
    head, _, tail = text.rpartition(":")
    try:
        path, scale = (Path(head), float(tail)) if head and not Path(text).exists() else (Path(text), 1.0)
    except ValueError:
        path, scale = Path(text), 1.0
    if not math.isfinite(scale):
        raise InvalidInputError(f"--lora {text}: the scale is not finite")
    if path.suffix in PICKLES:
        raise InvalidInputError(f"{path}: pickles can run arbitrary code and are not loaded; save it as safetensors")
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        reason = f"has no {LORA_FILE}; name the file inside it" if path.is_dir() else "no such file"
        raise InvalidInputError(f"{path}: {reason} (a LoRA is named as PATH or PATH:SCALE, SCALE a number)")
    return file, scale


def _lora_components(folder: Path, index: dict[str, Any]) -> tuple[Any, dict[str, nn.Module]]:
    """Load the pipeline with only the components that accept LoRAs; return it and those components."""
    import diffusers

    kind = str(index.get("_class_name"))
    loadable = getattr(getattr(diffusers, kind, None), "_lora_loadable_modules", None)
    if not loadable:
        raise InvalidInputError(f"{folder}: diffusers supports no LoRA for {kind}; leave out --lora")
    absent = {name: None for name, value in index.items() if isinstance(value, list) and name not in loadable}
    try:
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, **absent
        )
        pipe.to(torch.float32)
    except Exception as error:  # torch, transformers and diffusers raise many types for a broken folder
        raise InvalidInputError(f"{folder}: diffusers cannot load this {kind} ({first_line(error)})") from error
    components = {name: getattr(pipe, name, None) for name in loadable}
    return pipe, {name: component for name, component in components.items() if isinstance(component, nn.Module)}


def _add_lora_(pipe: Any, components: dict[str, nn.Module], file: Path, name: str) -> None:
    pairs = sum(bool(LORA_PAIR.search(key)) for key in tensor_shapes(file))
    if not pairs:
        raise InvalidInputError(
            f"{file}: contains no LoRA (no lora_A or lora_down tensors); is it another kind of file?"
        )
    try:
        with _quiet_transformers():
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, use_safetensors=True)
    except Exception as error:  # diffusers, peft and torch raise many types
        raise InvalidInputError(
            f"{file}: does not match {type(pipe).__name__}; is it a LoRA of another model? ({first_line(error)})"
        ) from error
    # diffusers only logs the pairs it skips, and may split a pair (fused q, k, v): more layers are fine, fewer are not
    layers = sum(_layer_count(model, name) for model in components.values())
    if layers < pairs:
        raise InvalidInputError(
            f"{file}: only {layers} of its {pairs} layers are in this {type(pipe).__name__}; "
            "is it a LoRA of another model?"
        )


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress the 'newly initialized' report: it lists weights that the LoRA lacks, but which are in fact kept."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _layer_count(model: nn.Module, adapter: str) -> int:
    return sum(adapter in getattr(module, "lora_A", ()) for module in model.modules())
