"""Locks of files and folders that only one process may write at a time: released when the process ends, even if killed.

The lock is on an open file (flock), so that no stale lock remains. The file is removed when the lock is released.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError

if sys.platform == "win32":
    import msvcrt

    def _try_lock(descriptor: int) -> None:
        msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
else:
    import fcntl

    def _try_lock(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def exclusive(lock: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `lock` during the block; its folder must exist.

    A file system without locks, such as some network mounts, is used without one.

    Raises:
        InvalidInputError: Another process holds it; the message names `what`.
        OSError: The lock file cannot be created.
    """
    descriptor = _locked(lock, what)
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            lock.unlink()  # before it is released: whoever locks the removed file notices it
        os.close(descriptor)


def _locked(lock: Path, what: Path) -> int:
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            _try_lock(descriptor)
        except (BlockingIOError, PermissionError) as error:
            os.close(descriptor)
            raise InvalidInputError(
                f"{what}: another command is writing here; wait until it has ended, or choose another folder"
            ) from error
        except OSError:
            return descriptor
        if _is_current(lock, descriptor):
            return descriptor
        os.close(descriptor)  # its last owner removed the file between our two calls


def _is_current(lock: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(lock.stat(), os.fstat(descriptor))
    except FileNotFoundError:
        return False
