"""Fuse LoRAs into a pipeline's weights: W' = W + sum_i scale_i * (alpha_i / rank_i) * B_i A_i.

diffusers drops tensors that it does not know (DoRA scales, LoKr, layers of another model) and only logs it. Here every
tensor of a file must reach a loaded layer: diffusers' conversion of its names is traced with autograd.
"""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import RECORD, write_folder
from diffpress.compress.sources.layout import INDEX, TEXT_ENCODERS, Layout, first_line, read_layout
from diffpress.compress.sources.pretrained import (
    TEXT_MODELS,
    load_diffusers_model,
    load_text_encoder,
    quiet_libraries,
)
from diffpress.compress.sources.terms import read_terms, stated_terms, write_terms
from diffpress.compress.sources.weights import (
    PICKLES,
    header_metadata,
    is_finite,
    read_tensors,
    tensor_shapes,
    unread_tensors,
)
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.io.files import read_json
from diffpress.runtime.lora.read import split_scale

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
    pipe, components = _lora_components(read_layout(folder))
    names = [f"lora_{number}" for number in range(len(adapters))]
    for name, (file, _) in zip(names, adapters, strict=True):
        _add_lora_(pipe, components, file, name)
    modified: dict[str, Any] = {
        component: model for component, model in components.items() if any(_layer_count(model, name) for name in names)
    }
    with quiet_libraries():
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
        write_terms(read_terms(folder), temporary)
        for file, _ in adapters:
            of_lora = stated_terms(header_metadata(file)) | (read_terms(file.parent) if file.name == LORA_FILE else {})
            prefix = f"LICENSE.{file.parent.name}.{file.stem}"
            write_terms({f"{prefix}.{name}": text for name, text in of_lora.items()}, temporary)

    write_folder(into, fill)
    return into


def parse_lora(text: str) -> tuple[Path, float]:
    """Parse 'PATH' or 'PATH:SCALE' into the safetensors file and its scale (default 1); PATH may contain colons."""
    path, scale = split_scale(text)
    if not math.isfinite(scale):
        raise InvalidInputError(f"--lora {text}: the scale is not finite")
    if path.suffix in PICKLES:
        raise InvalidInputError(f"{path}: pickles can run arbitrary code and are not loaded; save it as safetensors")
    file = path / LORA_FILE if path.is_dir() else path
    if not file.is_file():
        reason = f"has no {LORA_FILE}; name the file inside it" if path.is_dir() else "no such file"
        raise InvalidInputError(f"{path}: {reason} (a LoRA is named as PATH or PATH:SCALE, SCALE a number)")
    return file, scale


def _lora_components(layout: Layout) -> tuple[Any, dict[str, nn.Module]]:
    """Load the pipeline with only the components that accept LoRAs; return it and those components."""
    import diffusers

    kind, folder = layout.pipeline, layout.folder
    loadable = getattr(getattr(diffusers, kind, None), "_lora_loadable_modules", None)
    if not loadable:
        raise InvalidInputError(f"{folder}: diffusers supports no LoRA for {kind}; leave out --lora")
    present = [name for name in loadable if name in layout.configs or name == layout.denoiser.name]
    components = {name: _load_component(layout, name) for name in present}
    absent = {name: None for name, value in layout.index.items() if isinstance(value, list) and name not in components}
    try:
        with quiet_libraries():
            pipe = diffusers.DiffusionPipeline.from_pretrained(folder, local_files_only=True, **absent, **components)
    except Exception as error:  # torch, transformers and diffusers raise many types for a broken folder
        raise InvalidInputError(f"{folder}: diffusers cannot load this {kind} ({first_line(error)})") from error
    return pipe, components


def _load_component(layout: Layout, name: str) -> nn.Module:
    if name not in TEXT_ENCODERS:
        return load_diffusers_model(layout.denoiser, layout.kind)
    kind = layout.kind_of(name)
    if kind not in TEXT_MODELS:
        raise InvalidInputError(f"{layout.folder / name}: class '{kind}' is not supported; leave out --lora")
    return load_text_encoder(layout.folder / name, kind)


def _add_lora_(pipe: Any, components: dict[str, nn.Module], file: Path, name: str) -> None:
    if not any(LORA_PAIR.search(key) for key in tensor_shapes(file)):
        raise InvalidInputError(
            f"{file}: contains no LoRA (no lora_A or lora_down tensors); is it another kind of file?"
        )
    tensors = {key: tensor.float() for key, tensor in read_tensors(file)}
    for key, tensor in tensors.items():
        if "lora" not in key and not key.endswith(".alpha"):
            raise InvalidInputError(f"{file}: tensor '{key}' is not part of a LoRA, and diffusers cannot load it")
        if not is_finite(tensor):
            raise InvalidInputError(f"{file}: tensor '{key}' contains NaN or infinite values; the LoRA is broken")
    try:
        with quiet_libraries(), warnings.catch_warnings():
            # peft only warns of a rank or a scale that it does not apply
            warnings.filterwarnings("error", message=r".*(rank|alpha)_pattern keys did not match")
            pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=name, use_safetensors=True)
            loaded = _loaded_names(components, name)
            left = _tensors_without_effect(pipe, components, tensors, loaded)
    except Exception as error:  # diffusers, peft and torch raise many types
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise InvalidInputError(
            f"{file}: diffusers cannot fuse it completely into a {type(pipe).__name__} ({reason}); is it a LoRA of "
            "another model?"
        ) from error
    if left:
        raise InvalidInputError(
            f"{file}: tensor '{left[0]}' has no effect on this {type(pipe).__name__} ({len(left)} of {len(tensors)} in "
            "all); is it a LoRA of another model, or of a kind that diffusers cannot load?"
        )
    lacking = sorted(loaded - _converted(pipe, components, dict(tensors)).keys())
    if lacking:
        raise InvalidInputError(f"{file}: the tensor for '{lacking[0]}' is missing; copy it again")


def _tensors_without_effect(
    pipe: Any, components: dict[str, nn.Module], tensors: dict[str, torch.Tensor], loaded: set[str]
) -> list[str]:
    """Return the tensors of a file from which no tensor of the loaded adapter was computed."""
    left = unread_tensors(
        tensors,
        lambda state: [tensor for key, tensor in _converted(pipe, components, state).items() if key in loaded],
    )
    # scales are read as plain numbers: they count as read with their pair, unless the conversion left them over
    stray = any(key.endswith(".alpha") for key in _converted(pipe, components, dict(tensors)))
    layers = {key.split(".lora_")[0] for key in tensors if key not in left}
    return [key for key in left if stray or not (key.endswith(".alpha") and key.removesuffix(".alpha") in layers)]


def _converted(
    pipe: Any, components: dict[str, nn.Module], tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Return a file's tensors under 'component.name', with the names of peft, as diffusers converts them."""
    from diffusers.loaders.lora_pipeline import StableDiffusionXLLoraLoaderMixin
    from diffusers.utils.state_dict_utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
    )

    sdxl = isinstance(pipe, StableDiffusionXLLoraLoaderMixin)
    found = pipe.lora_state_dict(tensors, **({"unet_config": pipe.unet.config} if sdxl else {}))
    state = found if isinstance(found, dict) else found[0]
    named: dict[str, torch.Tensor] = {}
    for component, model in components.items():
        part = {key.removeprefix(f"{component}."): t for key, t in state.items() if key.startswith(f"{component}.")}
        if component in TEXT_ENCODERS:
            part = convert_state_dict_to_peft(convert_state_dict_to_diffusers(part)) if part else part
            prefix = "" if hasattr(model, "text_model") else "text_model."  # of older versions of transformers
            part = {key.removeprefix(prefix): tensor for key, tensor in part.items()}
        elif not any("lora_A" in key for key in part):
            part = convert_unet_state_dict_to_peft(part)
        named |= {f"{component}.{key}": tensor for key, tensor in part.items()}
    return named


def _loaded_names(components: dict[str, nn.Module], adapter: str) -> set[str]:
    """Return the names of an adapter's tensors in the components, as 'component.name'."""
    from peft import get_peft_model_state_dict

    return {
        f"{component}.{key}"
        for component, model in components.items()
        if adapter in getattr(model, "peft_config", {})
        for key in get_peft_model_state_dict(model, adapter_name=adapter)
    }


def _layer_count(model: nn.Module, adapter: str) -> int:
    return sum(adapter in getattr(module, "lora_A", ()) for module in model.modules())
