"""Arrays of a .npy or .npz file; nothing is unpickled, and nothing larger than the machine's memory is read.

A few KiB of a compressed file may expand to any size, and a header may claim any shape.
"""

from __future__ import annotations

import math
import os
import struct
import zipfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from diffpress.runtime.errors import InvalidInputError

# what numpy and zipfile raise for damaged files; SyntaxError and RecursionError: a header is a Python literal
DAMAGED = (
    OSError,
    ValueError,
    TypeError,
    EOFError,
    KeyError,
    IndexError,
    AttributeError,
    NotImplementedError,
    OverflowError,
    MemoryError,
    RuntimeError,
    SyntaxError,
    RecursionError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
)


def read_npz(path: Path, names: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """Read the arrays of an npz file, or those of them that are named; InvalidInputError if it cannot be read."""
    try:
        # numpy leaves a damaged archive open, so the file is opened here
        with path.open("rb") as opened:
            file = np.load(opened, allow_pickle=False)
            if isinstance(file, np.ndarray):
                raise InvalidInputError(f"{path}: holds a single array; expected an npz file of named arrays")
            wanted = [name for name in file.files if names is None or name in names]
            _check_size(sum(entry.file_size for entry in file.zip.infolist() if _array_name(entry) in wanted), path)
            arrays = {name: file[name] for name in wanted}
            for name, array in arrays.items():
                if not isinstance(array, np.ndarray):  # numpy returns the bytes of other files in the archive
                    raise InvalidInputError(f"{path}: {name!r} is no array; expected an npz file of named arrays")
            return arrays
    except DAMAGED as error:
        raise InvalidInputError(f"{path}: not readable as an npz file ({error})") from error


def _array_name(entry: zipfile.ZipInfo) -> str:
    return entry.filename.removesuffix(".npy")


def _check_size(size: int, path: Path) -> None:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else math.inf
    if size > memory:
        raise InvalidInputError(f"{path}: expands to {size / 2**30:.1f} GiB, more than this machine's memory")


def read_npy(path: Path) -> np.ndarray:
    """Read the array of a npy file; raises InvalidInputError if it is not readable or has objects."""
    try:
        with path.open("rb") as opened:
            array: np.ndarray = np.lib.format.read_array(opened, allow_pickle=False)
    except DAMAGED as error:
        raise InvalidInputError(f"{path}: not readable as a npy file ({error})") from error
    return array


def memory_map(path: Path) -> np.ndarray:
    """Memory-map the array of a npy file that can be generated again, so that rows are read on access."""
    try:
        rows: np.ndarray = np.load(path, mmap_mode="r", allow_pickle=False)
    except DAMAGED as error:
        raise InvalidInputError(f"{path}: cannot be read ({error}); delete it to generate it again") from error
    return rows
