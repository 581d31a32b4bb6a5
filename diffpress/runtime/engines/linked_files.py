"""Bundles whose files are links, as in a hub cache, where each file is a link to a blob named by its hash.

Engines read a graph's weights only from within the graph's own folder, and resolve links before they compare. So such a
bundle is opened from a folder of hard links in the user's cache, which takes no space (copies on another file system).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines.cache import UNLINKED, cache_folder
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import link_or_copy


def without_links(bundle: Bundle, graph: Path) -> Path:
    """Return the path of a bundle's graph in a folder without links: its own path if the bundle has none.

    Raises:
        InvalidInputError: The cache folder cannot be written.
    """
    files, real = bundle.manifest["files"], bundle.path.resolve()
    if all((bundle.path / name).resolve() == real / name for name in files):
        return graph
    folder = cache_folder() / UNLINKED / bundle.hash[:32]
    if not all(_size(folder / name) == entry["bytes"] for name, entry in files.items()):
        _make(bundle, folder)
    return folder / graph.relative_to(bundle.path)


def _make(bundle: Bundle, folder: Path) -> None:
    try:
        folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        # a name of its own: several processes may open the bundle at the same time
        with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temporary:
            for name in bundle.manifest["files"]:
                target = Path(temporary, "bundle", name)
                target.parent.mkdir(parents=True, exist_ok=True)
                link_or_copy(str(bundle.path / name), str(target))
            try:
                Path(temporary, "bundle").rename(folder)
            except OSError:
                if not folder.is_dir():  # else another process made it
                    raise
    except OSError as error:
        raise InvalidInputError(
            f"{bundle.path}: its files are links, which engines do not follow, and {folder} cannot be written "
            f"({error.strerror or error}); set DIFFPRESS_CACHE to a writable folder"
        ) from error


def _size(file: Path) -> int | None:
    return file.stat().st_size if file.is_file() else None
