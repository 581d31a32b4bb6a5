"""Files and folders that are written completely or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError

MAX_JSON_BYTES = 2**28  # the index of the largest published model has a few MiB, a tokenizer 20
MAX_JSON_DEPTH = 64


@contextmanager
def atomic(
    path: Path,
    hint: str = "choose another path",
    *,
    problem: str = "cannot be written",
    errors: type[Exception] = OSError,
    shared: bool = False,
) -> Iterator[Path]:
    """Yield the path of a temporary file in the same folder, and rename it to `path` if the block succeeds.

    Missing parent folders are created. What a killed process left under the temporary name is overwritten.

    Args:
        path: File to write.
        hint: What to do if it cannot be written, for the error message.
        problem: What failed, for the error message.
        errors: Exception of the block that means a failed write, besides OSError.
        shared: Whether several processes may write this file; the temporary name then contains the process id.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial" if shared else f".{path.name}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        temporary.replace(path)
    except (OSError, errors) as error:
        raise _failed(path, problem, error, hint) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, hint: str, *, errors: type[Exception] = OSError) -> Iterator[Path]:
    """Yield a new temporary sibling folder, and rename it to `folder` if the block succeeds; see `atomic`.

    What a killed process left under the temporary name is removed.

    Raises:
        InvalidInputError: The folder cannot be written.
    """
    temporary = folder.with_name(f".{folder.name}.partial")
    outgoing = folder.with_name(f".{folder.name}.outgoing")
    try:
        for leftover in (temporary, outgoing):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if folder.exists():
            folder.replace(outgoing)
        temporary.replace(folder)
        shutil.rmtree(outgoing, ignore_errors=True)
    except (OSError, errors) as error:
        raise _failed(folder, "cannot be written", error, hint) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write text atomically; raises InvalidInputError if the path is not writable."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: Any) -> None:
    """Write bytes or a buffer atomically (see `atomic`); raises InvalidInputError if the path is not writable."""
    with atomic(path) as temporary:
        temporary.write_bytes(data)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_limited(path: Path, most: int, what: str) -> bytes:
    """Read a file that is at most `most` bytes long.

    Raises:
        OSError: It cannot be read.
        ValueError: No file can have this name.
        InvalidInputError: It is larger; `what` names the kind of file that it should be.
    """
    with path.open("rb") as file:
        too_large = os.fstat(file.fileno()).st_size > most
        content = b"" if too_large else file.read(most + 1)
        if too_large or len(content) > most:  # a device has no size
            raise InvalidInputError(f"{path}: larger than {most >> 20} MiB, which is too large for {what}")
    return content


def read_json_bytes(path: Path, hint: str) -> bytes:
    """Read a JSON file of at most MAX_JSON_BYTES; raises InvalidInputError, with `hint`, if it cannot be read."""
    try:
        return read_limited(path, MAX_JSON_BYTES, "JSON")
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: not readable as JSON ({error}){hint and f'; {hint}'}") from error


def parsed_json(content: bytes, path: Path, hint: str) -> Any:
    """Parse the content of a JSON file; raises InvalidInputError, with `hint`, if it is malformed or nested deeply."""
    try:
        value = json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: not readable as JSON ({error}){hint and f'; {hint}'}") from error
    if _is_deep(value):  # what walks through it later would exceed Python's recursion limit
        raise InvalidInputError(f"{path}: JSON nested deeper than {MAX_JSON_DEPTH} levels{hint and f'; {hint}'}")
    return value


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(MAX_JSON_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
    return bool(level)


def read_json_value(path: Path, hint: str = "rerun the command that wrote it") -> Any:
    """Read any JSON value; raises InvalidInputError, with `hint`, if the file is missing or malformed."""
    return parsed_json(read_json_bytes(path, hint), path, hint)


def read_json(path: Path, hint: str = "rerun the command that wrote it") -> dict[str, Any]:
    """Read a JSON object; raises InvalidInputError, with `hint`, if the file is missing, malformed or no object."""
    data = read_json_value(path, hint)
    if not isinstance(data, dict):
        raise InvalidInputError(f"{path}: expected a JSON object{hint and f'; {hint}'}")
    return data


def link_or_copy(source: str, target: str) -> None:
    """Create a hard link to `source` at `target`, or a copy if the file system does not support links."""
    try:
        os.link(os.path.realpath(source), target)  # hub caches hold symlinks
    except OSError:
        shutil.copyfile(source, target)


def _failed(path: Path, problem: str, error: Exception, hint: str) -> InvalidInputError:
    return InvalidInputError(f"{path}: {problem} ({getattr(error, 'strerror', None) or error}); {hint}")
