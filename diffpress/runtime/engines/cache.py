"""What took long to compile, kept between processes: one file per entry, which proves itself when it is read.

    file = sha256(key + data), data          named by the sha256 of its key

The key says all that the data depends on: the graph's bytes, and what the engine adds. A file that is cut, damaged or
was put under another's name is no entry, and what was to be read is made again. Nothing here is needed to run: where
the folder cannot be written, nothing is kept.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

LIMIT = 4 * 2**30  # bytes of all entries; those that were used longest ago go first
LARGEST = 2**30  # bytes of one entry: what is larger takes long to read, too
SUFFIX = ".compiled"

DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Where this user's cache lies: $DIFFPRESS_CACHE, or diffpress in the system's own cache folder."""
    chosen = os.environ.get("DIFFPRESS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpress"


@dataclass(frozen=True)
class Cache:
    """Entries in a folder; `graph` names the bytes of the graph they are made of, and without it nothing is kept."""

    folder: Path
    graph: str | None = None

    def of(self, graph: str) -> Cache:
        """The same folder for the graph whose bytes have this name."""
        return replace(self, graph=graph)

    def read(self, key: str) -> bytes | None:
        """The data that was kept under this key, None where there is none that is sound."""
        if self.graph is None:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # used just now
        except OSError:
            return None
        data = content[DIGEST:]
        return data if content[:DIGEST] == self._digest(key, data) else None

    def write(self, key: str, data: bytes) -> None:
        """Keep the data under this key, whole or not at all, and forget what does not fit in beside it."""
        if self.graph is None or len(data) > LARGEST:
            return
        path = self._path(key)
        temporary = path.with_suffix(f".{os.getpid()}.partial")
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            temporary.write_bytes(self._digest(key, data) + data)
            os.replace(temporary, path)
            self._forget()
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / (self._digest(key, b"").hex()[:32] + SUFFIX)

    def _digest(self, key: str, data: bytes) -> bytes:
        digest = hashlib.sha256(f"{self.graph}\n{key}\n".encode())
        digest.update(data)
        return digest.digest()

    def _forget(self) -> None:
        stats = [(path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")]
        left = sum(stat.st_size for stat, _ in stats)
        for stat, path in sorted(stats, key=lambda entry: entry[0].st_mtime):
            if left <= LIMIT:
                return
            path.unlink(missing_ok=True)
            left -= stat.st_size
