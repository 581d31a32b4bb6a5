"""Atomic file writes: write to a temporary file in the same folder, then rename it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError


def write_text(path: Path, text: str) -> None:
    """Write text atomically; raises InvalidInputError if the path is not writable."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: Any) -> None:
    """Write bytes or a buffer atomically; raises InvalidInputError if the path is not writable."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another path"
        ) from error


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """Read a JSON file; raises InvalidInputError if it is missing or malformed."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: not readable as JSON ({error}); rerun the command that wrote it") from error
