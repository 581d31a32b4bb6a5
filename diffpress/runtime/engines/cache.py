"""Persistent cache of compiled models: one file per entry, verified when it is read.

    file = sha256(key + data), data          named by the sha256 of its key

The key covers everything the data depends on: the graph's bytes, and what the engine adds. A truncated, damaged or
renamed file counts as a cache miss, and its content is compiled again. The cache is optional: if the folder is not
writable, nothing is stored. Above the limit of all entries, DIFFPRESS_CACHE_GIB, the least recently used are removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import atomic

DEFAULT_GIB = 16.0  # an SDXL U-Net in int8 takes 2.6
SUFFIX = ".compiled"
UNLINKED, TENSORRT = "unlinked", "tensorrt"  # folders of linked_files.py and tensorrt/builder.py
ABANDONED_SECONDS = 3600.0  # after which a temporary file is what a killed process left

# what diffpress keeps in the cache folder -> its files or folders; nothing else in there is touched
CONTENTS = {
    "compiled models": f"*{SUFFIX}",
    "bundles without links": f"{UNLINKED}/*",
    "TensorRT timings": f"{TENSORRT}/timing-*.cache",
    "unfinished writes": f".*{SUFFIX}.*.partial",
}

DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path:
    """Return the user's cache folder: $DIFFPRESS_CACHE, or `diffpress` in the system's cache folder."""
    chosen = os.environ.get("DIFFPRESS_CACHE")
    if chosen:
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffpress"


def limit_bytes() -> int:
    """Return the limit of all entries: $DIFFPRESS_CACHE_GIB, or DEFAULT_GIB.

    Raises:
        InvalidInputError: The variable is not a number of at least 0.
    """
    chosen = os.environ.get("DIFFPRESS_CACHE_GIB") or str(DEFAULT_GIB)
    try:
        limit = float(chosen)
    except ValueError:
        limit = math.nan
    if not 0.0 <= limit < math.inf:
        raise InvalidInputError(f"DIFFPRESS_CACHE_GIB={chosen}: give a number of GiB, 0 to store nothing")
    return int(limit * 2**30)


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
            with path.open("rb", buffering=0) as file:  # a buffered file would hold the rest twice
                digest, data = file.read(DIGEST), file.read()
            os.utime(path)  # marks it as recently used
        except OSError:
            return None
        return data if digest == self._digest(key, data) else None

    def write(self, key: str, data: bytes | memoryview) -> None:
        """Store data under `key` atomically and evict old entries above the size limit."""
        if self.graph is None or len(data) > limit_bytes():
            return
        with contextlib.suppress(OSError, InvalidInputError):
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with atomic(self._path(key), durable=False) as temporary, temporary.open("wb") as file:
                file.writelines((self._digest(key, data), data))
            self._evict()

    def _path(self, key: str) -> Path:
        return self.folder / (self._digest(key, b"").hex()[:32] + SUFFIX)

    def _digest(self, key: str, data: bytes | memoryview) -> bytes:
        digest = hashlib.sha256(f"{self.graph}\n{key}\n".encode())
        digest.update(data)
        return digest.digest()

    def _evict(self) -> None:
        for path in self.folder.glob(CONTENTS["unfinished writes"]):
            if time.time() - path.stat().st_mtime > ABANDONED_SECONDS:
                path.unlink(missing_ok=True)
        stats = [(path.stat(), path) for path in self.folder.glob(f"*{SUFFIX}")]
        total, limit = sum(stat.st_size for stat, _ in stats), limit_bytes()
        for stat, path in sorted(stats, key=lambda entry: entry[0].st_mtime):
            if total <= limit:
                return
            path.unlink(missing_ok=True)
            total -= stat.st_size
