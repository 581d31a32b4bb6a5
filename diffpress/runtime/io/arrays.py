"""Arrays of a .npy or .npz file; nothing is unpickled."""

from __future__ import annotations

import zipfile
from collections.abc import Collection
from pathlib import Path

import numpy as np

from diffpress.runtime.errors import InvalidInputError


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file, or those of them that are named; InvalidInputError if it cannot be read."""
    try:
        # numpy leaves a damaged archive open, so the file is opened here
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise InvalidInputError(f"{path}: holds a single array; expected an npz file of named arrays")
            return {name: file[name] for name in file.files if names is None or name in names}
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise InvalidInputError(f"{path}: not readable as an npz file ({error})") from error


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a npy file; raises InvalidInputError if it is not readable or has objects."""
    try:
        with path.open("rb") as opened:
            array: np.ndarray = np.lib.format.read_array(opened, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"{path}: not readable as a npy file ({error})") from error
    return array


def memory_map(path: Path) -> np.ndarray:
    """Memory-map the array of a npy file that can be generated again, so that rows are read on access."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InvalidInputError(f"{path}: cannot be read ({error}); delete it to generate it again") from error
    return rows
