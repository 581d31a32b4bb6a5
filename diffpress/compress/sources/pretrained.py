"""Load one component of a pipeline as a float32 module, as `from_pretrained` does but with every tensor checked.

diffusers and transformers fill what a file lacks with random values, drop what they do not know, and only print it.
"""

from __future__ import annotations

import contextlib
import re
import warnings
from collections.abc import Iterator
from logging import CRITICAL
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.weights import (
    is_finite,
    load_weights_,
    refuse_quantized,
    tensor_shapes,
    variant_of,
    weight_files,
)
from diffpress.runtime.errors import InvalidInputError

# Tensors that a decoder's file may lack: decoding does not read them.
ENCODER = ("encoder.", "quant_conv.")
# Tensors that a text encoder's file may have besides its own, by class: those of the complete model, which transformers
# drops as well, and buffers that older versions stored.
CLIP_EXTRA = re.compile(r"^(vision_model|visual_projection|text_projection|logit_scale)\b|\bposition_ids$")
EXTRA = {
    "CLIPTextModel": CLIP_EXTRA,
    "CLIPTextModelWithProjection": CLIP_EXTRA,
    "T5EncoderModel": re.compile(r"^(decoder|lm_head)\b"),
}
TEXT_MODELS = tuple(EXTRA)
DECODER_MODELS = ("AutoencoderKL", "VQModel", "AutoencoderTiny", "AsymmetricAutoencoderKL")


def load_diffusers_model(folder: Path, kind: str, optional: tuple[str, ...] = ()) -> nn.Module:
    """Load a model of diffusers; parameters that `optional` allows to be missing stay on the meta device.

    Raises:
        InvalidInputError: It cannot be built from its config, or a tensor is refused by `load_weights_`.
    """
    import diffusers
    from accelerate import init_empty_weights

    try:
        model: Any = getattr(diffusers, kind)
        with quiet_libraries(), init_empty_weights(include_buffers=False):
            module: nn.Module = model.from_config(model.load_config(folder, local_files_only=True))
    except Exception as error:  # torch and diffusers raise many types for invalid settings
        raise InvalidInputError(
            f"{folder / 'config.json'}: {kind} cannot be built from it ({first_line(error)})"
        ) from error
    load_weights_(module, weight_files(folder), optional=optional)
    return module.eval().requires_grad_(False)


def load_text_encoder(folder: Path, kind: str) -> nn.Module:
    """Load one of `TEXT_MODELS` from transformers.

    Raises:
        InvalidInputError: It cannot be loaded, or a tensor is missing, left over, quantized, of the wrong shape or not
            finite.
    """
    import transformers

    files = weight_files(folder)
    for file in files:
        refuse_quantized(file)
    try:
        with quiet_libraries():
            module, found = getattr(transformers, kind).from_pretrained(
                folder,
                dtype=torch.float32,
                return_dict=True,  # whatever its config says: outputs are read by name
                use_safetensors=True,
                local_files_only=True,
                variant=variant_of(folder),
                ignore_mismatched_sizes=True,  # found below, by name
                output_loading_info=True,
            )
    except Exception as error:  # transformers raises many types
        raise InvalidInputError(f"{folder}: {kind} cannot be loaded ({first_line(error)}); copy it again") from error
    _check_loaded(module, found, files, EXTRA[kind])
    return module.eval().requires_grad_(False)


def _check_loaded(module: nn.Module, found: dict[str, Any], files: list[Path], extra: re.Pattern[str]) -> None:
    stored = {name: file for file in files for name in tensor_shapes(file)}
    # transformers adds and removes prefixes such as 'text_model.'; the messages have the file's own names
    prefixes = (key.removesuffix(name) for name in module.state_dict() for key in stored if key.endswith(f".{name}"))
    prefix = next(prefixes, "")

    def where(name: str) -> tuple[Path, str]:
        """Return the file that holds a tensor, and its name there."""
        candidates = (name, prefix + name, *(key for key in stored if key.endswith(f".{name}")))
        key = next((key for key in candidates if key in stored), prefix + name)
        return stored.get(key, files[0]), key

    for name, in_file, expected in sorted(found["mismatched_keys"]):
        file, key = where(name)
        raise InvalidInputError(
            f"{file}: tensor '{key}' has shape {list(in_file)}, the config requires {list(expected)}"
        )
    for name in sorted(found["unexpected_keys"]):
        file, key = where(name)
        if not extra.search(name) and not extra.search(key):
            raise InvalidInputError(
                f"{file}: tensor '{key}' does not belong to this model; is it a foreign checkpoint?"
            )
    if found["missing_keys"]:
        file, key = where(sorted(found["missing_keys"])[0])
        raise InvalidInputError(
            f"{file}: tensor '{key}' is missing ({len(found['missing_keys'])} in all); copy it again"
        )
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not is_finite(tensor):
            file, key = where(name)
            raise InvalidInputError(f"{file}: tensor '{key}' contains NaN or infinite values; the checkpoint is broken")


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Suppress messages, warnings and progress bars of diffusers and transformers: what matters is checked here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = diffusers_logging, transformers_logging
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity(CRITICAL)
        library.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for library, (level, bar) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
