"""Files written whole or not at all: a temporary neighbour, then one rename."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError


def write_text(path: Path, text: str) -> None:
    """Write text atomically; InvalidInputError where the place cannot be written."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: Any) -> None:
    """Write bytes, or what holds some, atomically; InvalidInputError where the place cannot be written."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> Any:
    """The file's content; InvalidInputError where it is missing or broken."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: not readable as JSON ({error}); run the command that wrote it again"
        ) from error
