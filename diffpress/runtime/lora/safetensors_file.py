"""Tensors of a safetensors file as numpy arrays, without the safetensors package.

    uint64 N | N bytes of JSON {name: {"dtype", "shape", "data_offsets": [start, end]}, "__metadata__": {...}} | data

The header is checked completely before a tensor is read: sizes, offsets without gaps or overlaps, as the format asks.
bfloat16 is the upper half of a float32.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.errors import InvalidInputError

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors package
LENGTH_BYTES = 8
METADATA = "__metadata__"

# those that LoRAs are stored in
DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4"}
ZIP, PICKLE = b"PK\x03\x04", b"\x80"


class TensorFile(NamedTuple):
    """Arrays of a file by name, float32 or float64 (or integers), and its metadata."""

    tensors: Mapping[str, np.ndarray]
    metadata: Mapping[str, str]


def read_safetensors(path: Path) -> TensorFile:
    """Read a safetensors file.

    Raises:
        InvalidInputError: It does not exist, is damaged, is something else, or has a tensor of a dtype not in DTYPES.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(LENGTH_BYTES)
            if start.startswith((ZIP, PICKLE)):
                raise InvalidInputError(f"{path}: not safetensors but a pickle, which is never loaded; convert it")
            length = int.from_bytes(start, "little")
            if len(start) < LENGTH_BYTES or length > min(size - LENGTH_BYTES, MAX_HEADER_BYTES):
                raise InvalidInputError(f"{path}: not a safetensors file, or cut off; copy it again")
            header = _header(path, file.read(length))
        data = np.memmap(path, np.uint8, "r", LENGTH_BYTES + length) if size > LENGTH_BYTES + length else np.empty(0)
    except OSError as error:
        raise InvalidInputError(f"{path}: {error.strerror or error}; name a .safetensors file") from error
    metadata = header.pop(METADATA, {})
    if not isinstance(metadata, dict):
        raise _damaged(path, METADATA)
    _check_offsets(path, header, len(data))
    return TensorFile({name: _array(path, name, entry, data) for name, entry in header.items()}, metadata)


def _header(path: Path, text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}: not a safetensors file, its header is no valid JSON; copy it again"
        ) from error
    if not isinstance(header, dict):
        raise InvalidInputError(f"{path}: not a safetensors file, its header is no object; copy it again")
    return header


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) != len(pairs):
        raise ValueError("a key is there twice")
    return dict(pairs)


def _check_offsets(path: Path, header: Mapping[str, Any], size: int) -> None:
    """Check every entry, and that the tensors fill the data one after the other."""
    for name, entry in header.items():
        if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
            raise _damaged(path, name)
        numbers = [entry["shape"], entry["data_offsets"]]
        if not all(isinstance(v, list) and all(type(n) is int and n >= 0 for n in v) for v in numbers):
            raise _damaged(path, name)
        if entry["dtype"] not in DTYPES:
            known = ", ".join(DTYPES)
            raise InvalidInputError(f"{path}: tensor '{name}' is {entry['dtype']}, not one of {known}; convert it")
        item = np.dtype(DTYPES[entry["dtype"]]).itemsize
        offsets = entry["data_offsets"]
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(entry["shape"]) * item:
            raise _damaged(path, name)
    end = 0
    for name, entry in sorted(header.items(), key=lambda one: one[1]["data_offsets"]):
        first, last = entry["data_offsets"]
        if first != end or last > size:
            raise _damaged(path, name)
        end = last
    if end != size:
        raise InvalidInputError(f"{path}: has {size - end} bytes after its last tensor; copy it again")


def _array(path: Path, name: str, entry: Mapping[str, Any], data: np.ndarray) -> np.ndarray:
    first, last = entry["data_offsets"]
    raw = data[first:last].view(DTYPES[entry["dtype"]]) if last > first else np.empty(0, DTYPES[entry["dtype"]])
    if entry["dtype"] == "BF16":
        raw = (raw.astype(np.uint32) << 16).view(np.float32)
    return np.asarray(raw).reshape(entry["shape"])


def _damaged(path: Path, name: str) -> InvalidInputError:
    return InvalidInputError(f"{path}: entry '{name}' of its header is damaged; copy it again")
