"""Persistent cache of compiled models: one file per entry, verified when it is read.

    file = sha256(key + data), data          named by the sha256 of its key

The key covers everything the data depends on: the graph's bytes, and what the engine adds. A truncated, damaged or
renamed file counts as a cache miss, and its content is compiled again. The cache is optional: if the folder is not
writable, nothing is stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import write_bytes

LIMIT = 4 * 2**30  # bytes of all entries; the least recently used are evicted first
LARGEST = 2**30  # bytes of one entry: larger ones are slow to read as well
SUFFIX = ".compiled"

DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return the user's cache folder: $DIFFPRESS_CACHE, or `diffpress` in the system's cache folder."""
    chosen = os.environ.get("DIFFPRESS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpress"


@dataclass(frozen=True)
class Cache:
    """Cache in a folder; `graph` identifies the bytes of the source graph, and None disables reading and writing."""

    folder: Path
    graph: str | None = None

    def of(self, graph: str) -> Cache:
        """Return the cache in the same folder for another graph."""
        return replace(self, graph=graph)

    def read(self, key: str) -> bytes | None:
        """Return the data stored under `key`, or None if there is no valid entry."""
        if self.graph is None:
            return None
        path = self._path(key)
        try:
            content = path.read_bytes()
            os.utime(path)  # marks it as recently used
        except OSError:
            return None
        data = content[DIGEST:]
        return data if content[:DIGEST] == self._digest(key, data) else None

    def write(self, key: str, data: bytes) -> None:
        """Store data under `key` atomically and evict old entries above the size limit."""
        if self.graph is None or len(data) > LARGEST:
            return
        with contextlib.suppress(OSError, InvalidInputError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_bytes(self._path(key), self._digest(key, data) + data, shared=True)
            self._evict()

    def _path(self, key: str) -> Path:
        return self.folder / (self._digest(key, b"").hex()[:32] + SUFFIX)

    def _digest(self, key: str, data: bytes) -> bytes:
        digest = hashlib.sha256(f"{self.graph}\n{key}\n".encode())
        digest.update(data)
        return digest.digest()

    def _evict(self) -> None:
        stats = [(path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")]
        total = sum(stat.st_size for stat, _ in stats)
        for stat, path in sorted(stats, key=lambda entry: entry[0].st_mtime):
            if total <= LIMIT:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
