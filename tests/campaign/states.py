"""What a run's folder holds at one moment: which files are temporary, and whether every other file is whole."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np

from diffpress.runtime.bundle import MANIFEST, load_bundle
from diffpress.runtime.errors import DiffpressError
from diffpress.runtime.io.files import LOCK, OUTGOING, PARTIAL

TEMPORARY = (PARTIAL, OUTGOING, LOCK)


def is_temporary(path: Path) -> bool:
    """Return whether a path lies in a temporary file or folder, which no command reads."""
    return any(part.startswith(".") and part.endswith(TEMPORARY) for part in path.parts)


def lasting_files(folder: Path) -> list[Path]:
    """Return the files that a later command would read."""
    return sorted(p for p in folder.rglob("*") if p.is_file() and not is_temporary(p.relative_to(folder)))


def lasting_state(folder: Path) -> str:
    """Return a hash of the names and contents of all files that are not temporary."""
    digest = hashlib.sha256()
    for path in lasting_files(folder):
        digest.update(f"{path.relative_to(folder)}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def half_written(folder: Path) -> list[str]:
    """Return the files that a later command would take for whole and that are not, with the reason."""
    found = []
    for path in lasting_files(folder):
        try:
            if path.stat().st_size == 0:
                raise ValueError("empty")
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".safetensors":
                _check_safetensors(path)
            elif path.suffix == ".npz":
                with np.load(path) as arrays:
                    _ = [arrays[name].shape for name in arrays.files]
            elif path.suffix == ".html" and not path.read_text().rstrip().endswith("</html>"):
                raise ValueError("cut off")
            elif path.suffix == ".png":
                _check_image(path)
            if path.name == MANIFEST:
                load_bundle(path.parent)
        except (ValueError, OSError, DiffpressError) as error:
            found.append(f"{path.relative_to(folder)} is not whole: {error}")
    return found


def _check_safetensors(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np") as opened:
            list(opened.keys())
    except SafetensorError as error:
        raise ValueError(str(error)) from error


def _check_image(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        image.load()
