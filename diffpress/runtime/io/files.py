"""Files and folders that are written completely or not at all: under a temporary name, then renamed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.locks import exclusive

PARTIAL, OUTGOING, LOCK = ".partial", ".outgoing", ".lock"  # suffixes of temporary names

# a part of temporary names, which several machines may make in one folder
_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:4]
_NUMBERS = itertools.count()

MAX_JSON_BYTES = 2**28  # the index of the largest published model has a few MiB, a tokenizer 20
MAX_JSON_DEPTH = 64


@contextmanager
def atomic(
    path: Path,
    hint: str = "choose another path",
    *,
    problem: str = "cannot be written",
    errors: type[Exception] = OSError,
    durable: bool = True,
) -> Iterator[Path]:
    """Yield the path of a temporary file in the same folder, and rename it to `path` if the block succeeds.

    Missing parent folders are created. Each call has a temporary name of its own, so that several threads and processes
    may write one file: it is always what one of them wrote. What killed processes left is removed.

    Args:
        path: File to write.
        hint: What to do if it cannot be written, for the error message.
        problem: What failed, for the error message.
        errors: Exception of the block that means a failed write, besides OSError.
        durable: Write the content to the disk before the rename, so that a power loss leaves the old file or the new
            one. Not needed for files that are verified when they are read, and made again.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_NUMBERS)}{PARTIAL}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        yield temporary
        if durable:
            _sync(temporary)
        temporary.replace(path)
        if durable:
            _sync(path.parent)
    except (OSError, errors) as error:
        raise _failed(path, problem, error, hint) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path, hint: str, *, errors: type[Exception] = OSError) -> Iterator[Path]:
    """Yield a new temporary sibling folder, and rename it to `folder` if the block succeeds; see `atomic`.

    What a killed process left under the temporary name is removed. If `folder` was being replaced at that moment, its
    old content is restored first.

    Raises:
        InvalidInputError: The folder cannot be written, or another process is writing it.
    """
    temporary = folder.with_name(f".{folder.name}{PARTIAL}")
    outgoing = folder.with_name(f".{folder.name}{OUTGOING}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with exclusive(folder.with_name(f".{folder.name}{LOCK}"), folder):
            _restore(outgoing, folder)
            shutil.rmtree(temporary, ignore_errors=True)
            try:
                temporary.mkdir()
                yield temporary
                for path in (*temporary.rglob("*"), temporary):
                    _sync(path)
                if folder.exists():
                    folder.replace(outgoing)
                temporary.replace(folder)
                _sync(folder.parent)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
                _restore(outgoing, folder)
    except (OSError, errors) as error:
        raise _failed(folder, "cannot be written", error, hint) from error


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes left anywhere below a folder that no other process is writing; see `atomic`."""
    for path in [*folder.rglob(f".*{OUTGOING}"), *folder.rglob(f".*{PARTIAL}"), *folder.rglob(f".*{LOCK}")]:
        if path.name.endswith(OUTGOING):
            _restore(path, path.with_name(path.name[1 : -len(OUTGOING)]))
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)


def _restore(outgoing: Path, folder: Path) -> None:
    """Move a replaced folder back if nothing took its place; otherwise remove it."""
    with contextlib.suppress(OSError):
        if outgoing.exists() and not folder.exists():
            outgoing.replace(folder)
    shutil.rmtree(outgoing, ignore_errors=True)


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files for `path` that were left by processes of this machine that no longer run."""
    start = f".{path.name}.{_HOST}-"
    with contextlib.suppress(OSError):
        for entry in os.scandir(path.parent):
            if entry.name.startswith(start) and entry.name.endswith(PARTIAL):
                writer = entry.name[len(start) :].partition("-")[0]
                if writer.isdecimal() and not _is_running(int(writer)):
                    Path(entry).unlink(missing_ok=True)


def _is_running(process: int) -> bool:
    if sys.platform == "win32":
        return True  # there, signal 0 would end the process
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):  # another user's
        return True
    return True


def _sync(path: Path) -> None:
    """Write a file's content, or a folder's entries, to the disk; some file systems have no such operation."""
    if path.is_dir() and sys.platform == "win32":
        return
    descriptor = os.open(path, os.O_RDWR if sys.platform == "win32" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


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
            raise InvalidInputError(f"{path}: larger than {_size(most)}, which is too large for {what}")
    return content


def _size(count: int) -> str:
    return f"{count >> 20} MiB" if count >= 2**20 else f"{count >> 10} KiB"


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
        if b"\\ud" in content.lower():  # half of a surrogate pair, which no file name or text can have
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except (ValueError, RecursionError) as error:
        raise InvalidInputError(f"{path}: not readable as JSON ({error}){hint and f'; {hint}'}") from error
    if _is_deep(value):  # what visits it later would exceed Python's recursion limit
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
