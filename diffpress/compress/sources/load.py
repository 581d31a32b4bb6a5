"""Anything a user may call a checkpoint -> `Checkpoint`: a folder, one file, a hub id, or `file.py:weights`.

    folder with model_index.json or unet/     a diffusers pipeline; or the unet/ folder itself
    folder with diffpress.json                what a stage saved: config + widths + safetensors; or, written by
                                              hand, the `conditioning` (null label) and `plan` that no
                                              diffusers config can say
    file.safetensors                          a finetune in one file, where diffusers can read it
    owner/name                                a hub id, passed to diffusers' own download
    file.py:weights                           the file gives  load(path) -> (module, DenoiserSpec)

Weights come from safetensors only, and are streamed: nothing is ever unpickled, and nothing held twice. Only the
denoiser is read here; text encoders and decoders stay on disk until they are run or exported (compress/models/components.py).
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.custom_module import load_custom_module
from diffpress.compress.sources.diffusers_folder import load_diffusers_folder
from diffpress.compress.sources.hub import downloaded
from diffpress.compress.sources.layout import (
    PICKLES,
)
from diffpress.compress.sources.lora import fused
from diffpress.compress.sources.single_file import from_single_file
from diffpress.runtime.errors import InvalidInputError


def load_checkpoint(
    reference: str | Path,
    *,
    loras: Sequence[str] = (),
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Load a checkpoint from a folder, a file, a hub id or `file.py:weights`; every problem is a InvalidInputError.

    `loras` are fused into a pipeline's weights, 'PATH' or 'PATH:scale' each; `config` is a pipeline folder that says
    how a single file is built; the denoiser's weights are held as `dtype`.
    """
    text = str(reference)
    custom = re.fullmatch(r"(.+\.py):(.+)", text)
    if custom:
        if loras:
            raise InvalidInputError(f"{text}: a LoRA can be fused into a diffusers pipeline, not into a custom module")
        return load_custom_module(Path(custom[1]), Path(custom[2]))
    folder = _folder_of(text, config)
    return load_diffusers_folder(fused(folder, loras, _scratch()) if loras else folder, dtype)


def _folder_of(text: str, config: str | None) -> Path:
    path = Path(text)
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return from_single_file(path, _scratch(), config)
    if path.exists():
        raise InvalidInputError(_not_a_folder(path))
    if re.fullmatch(r"[\w.-]+/[\w.-]+", text) and not text.startswith("."):
        return downloaded(text)
    raise InvalidInputError(f"{text}: no such checkpoint folder, and not a hub id of the form owner/name")


def _not_a_folder(path: Path) -> str:
    if path.suffix in PICKLES:
        return f"{path}: a pickle can run any code when read, so diffpress does not; convert it to safetensors first"
    return f"{path}: a checkpoint is a folder in diffusers' layout, a hub id, a .safetensors file, or file.py:weights"


def _scratch() -> Path:
    """A place for a converted pipeline; it goes when the program ends."""
    folder = Path(tempfile.mkdtemp(prefix="diffpress-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "pipeline"
