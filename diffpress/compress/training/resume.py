"""What a killed run needs to go on: tensors in one safetensors file with metadata, put in place by one rename."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffpress.compress.training.distributed import is_main
from diffpress.runtime.errors import InvalidInputError

Tensors = dict[str, torch.Tensor]


def write_state(path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], what: str) -> None:
    """Write `path`, and its folder where there is none; tensors of any layout, on any device.

    Only the main process writes.

    Raises InvalidInputError, calling it `what` ('state of calibration'), where the disk does not take it.
    """
    if not is_main():
        return
    # clones, for safetensors refuses tensors that share storage, as tied weights do
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    temporary = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(stored, temporary, metadata=metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a type of its own
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(f"{path}: the {what} cannot be saved ({reason}); make space and run again") from error


def read_state(path: Path, what: str) -> tuple[Tensors, dict[str, str]] | None:
    """The tensors and metadata of `path`, None where there is no such file; raises InvalidInputError for one that is broken."""
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as opened:
            metadata = opened.metadata() or {}
        return load_file(path), metadata
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(
            f"{path}: the saved {what} cannot be read ({error}); delete it to start over"
        ) from error
