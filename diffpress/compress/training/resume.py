"""Resumable state: tensors in one safetensors file with metadata, written atomically by a rename."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from diffpress.compress.training.distributed import is_main
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import atomic

Tensors = dict[str, torch.Tensor]


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], metadata: dict[str, str], what: str, every_process: bool = False
) -> None:
    """Write tensors of any layout and device to `path`, in the main process only unless `every_process`.

    Creates the folder if it does not exist.

    Args:
        path: The safetensors file.
        tensors: Tensors by name.
        metadata: Strings to store with them.
        what: Name of the state in error messages, such as 'state of calibration'.
        every_process: Write in each of several processes, to a path of its own.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    if not (is_main() or every_process):
        return
    # cloned, since safetensors refuses tensors that share storage, such as tied weights
    stored = {name: value.detach().cpu().contiguous().clone() for name, value in tensors.items()}
    problem, hint = f"the {what} cannot be saved", "free disk space and run again"
    # safetensors reports a full disk with its own exception
    with atomic(path, hint, problem=problem, errors=SafetensorError) as temporary:
        save_file(stored, temporary, metadata=metadata)


def read_state(path: Path, what: str) -> tuple[Tensors, dict[str, str]] | None:
    """Read the tensors and metadata of `path`; return None if there is no such file.

    Raises:
        InvalidInputError: The file is unreadable. The message calls it `what`.
    """
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
