"""Load a `Checkpoint` from a folder, a single file, a hub id, or `file.py:weights`.

    folder with model_index.json or unet/     a diffusers pipeline, or the unet/ folder itself
    folder with diffpress.json                a saved checkpoint: config + widths + safetensors; or a pipeline with
                                              a hand-written record of the `conditioning` (null label) and `plan`,
                                              which diffusers configs cannot express
    file.safetensors                          a single-file checkpoint, if diffusers can read it
    owner/name                                a hub id, downloaded by diffusers
    file.py:weights                           the file defines  load(path) -> (module, DenoiserSpec)
    calib_data/...                            a built-in checkpoint, such as calib_data/icons/teacher

Weights are streamed from safetensors: nothing is unpickled, and no tensor is held twice. Only the denoiser is loaded;
text encoders and decoders stay on disk until they are run or exported (compress/models/components.py).
"""

from __future__ import annotations

import atexit
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from diffpress.compress.builtin import CALIB_DATA, built_in_path
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.sources.custom_module import load_custom_module
from diffpress.compress.sources.diffusers_folder import load_diffusers_folder
from diffpress.compress.sources.hub import HUB_ID, download_pipeline
from diffpress.compress.sources.lora import fuse_loras
from diffpress.compress.sources.single_file import from_single_file
from diffpress.compress.sources.weights import PICKLES
from diffpress.runtime.errors import InvalidInputError


def load_checkpoint(
    reference: str | Path,
    *,
    loras: Sequence[str] = (),
    config: str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Checkpoint:
    """Load a checkpoint from a folder, a file, a hub id or `file.py:weights`.

    Args:
        reference: What to load.
        loras: LoRAs to fuse into the pipeline's weights, each 'PATH' or 'PATH:SCALE'.
        config: Pipeline folder or hub id that supplies the configs of a single file.
        dtype: Floating-point type of the denoiser's weights in memory.

    Raises:
        InvalidInputError: The checkpoint cannot be loaded.
    """
    text = str(reference)
    custom = re.fullmatch(r"(.+\.py):(.+)", text)
    if custom:
        if loras:
            raise InvalidInputError(
                f"{text}: a LoRA cannot be fused into a custom module, only into a diffusers pipeline"
            )
        return load_custom_module(Path(custom[1]), Path(custom[2]))
    folder = _folder_of(text, config)
    return load_diffusers_folder(fuse_loras(folder, loras, _temporary_folder()) if loras else folder, dtype)


def _folder_of(text: str, config: str | None) -> Path:
    path = built_in_path(text)
    if path != Path(text) and not path.exists():
        raise InvalidInputError(f"{text}: not among the built-in data; it has {_built_in_checkpoints()}")
    if path.is_dir():
        return path
    if path.is_file() and path.suffix == ".safetensors":
        return from_single_file(path, _temporary_folder(), config)
    if path.exists():
        raise InvalidInputError(_not_a_folder(path))
    if HUB_ID.fullmatch(text):
        return download_pipeline(text)
    raise InvalidInputError(f"{text}: no such checkpoint folder, and not a hub id of the form owner/name")


def _built_in_checkpoints() -> str:
    folders = sorted(file.parent.parent for file in CALIB_DATA.glob("**/unet/config.json"))
    return ", ".join(f"{CALIB_DATA.name}/{folder.relative_to(CALIB_DATA).as_posix()}" for folder in folders)


def _not_a_folder(path: Path) -> str:
    if path.suffix in PICKLES:
        return f"{path}: pickles can run arbitrary code and are not loaded; convert it to safetensors first"
    return f"{path}: a checkpoint is a folder in diffusers' layout, a hub id, a .safetensors file, or file.py:weights"


def _temporary_folder() -> Path:
    """Return a path for a converted pipeline, deleted at exit."""
    folder = Path(tempfile.mkdtemp(prefix="diffpress-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder / "pipeline"
