"""Samples on disk, written as they are made.

    DIR/                            one PNG for each sample, DIR/000042.png for seed 42, with its record
    FILE.png .jpg .jpeg .webp       one image grid
    FILE.npy                        the samples, float32 [N, ...]
    FILE.npz                        the same under the name `samples`

A folder keeps what is finished when a run is interrupted. A file is written completely or not at all.
"""

from __future__ import annotations

import math
import os
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import atomic
from diffpress.runtime.io.image_records import Record, common_record, image_path
from diffpress.runtime.io.images import FORMATS, GRID_GAP, image_grid, to_uint8, write_image

Write = Callable[[np.ndarray], None]  # takes the samples of one batch, float32 [B, ...], in order

ARRAYS = (".npy", ".npz")
ARRAY_NAME = "samples"
MAX_GRID_PIXELS = 2**26  # Pillow warns about larger images when it opens them


def is_folder(out: str) -> bool:
    """Return whether an output path means a folder: it ends in a slash, or is one."""
    return out.endswith(("/", os.sep)) or Path(out).is_dir()


def is_array(out: str) -> bool:
    """Return whether an output path means an array file."""
    return not is_folder(out) and _suffix(out) in ARRAYS


def check_output(out: str) -> None:
    """Raise InvalidInputError if the path means no kind of output, or a folder where there is a file."""
    if is_folder(out) and Path(out).is_file():
        raise InvalidInputError(f"--out {out}: is a file, not a folder; choose another path")
    if not is_folder(out) and _suffix(out) not in (*FORMATS, *ARRAYS):
        kinds = ", ".join((*filter(None, FORMATS), *ARRAYS))
        raise InvalidInputError(f"--out {out}: unknown kind of file; use {kinds}, or a folder, as in --out DIR/")


def check_pictures(out: str, count: int, channels: int, size: tuple[int, int]) -> None:
    """Check that `count` pictures of this size (height, width) fit into the output, before they are made.

    Raises:
        InvalidInputError: The image grid is too large, or the format does not store this number of channels.
    """
    if is_folder(out) or is_array(out):
        return
    kind, columns = FORMATS[_suffix(out)], math.ceil(math.sqrt(count))
    if channels not in kind.channels:
        raise InvalidInputError(f"--out {out}: {kind.name} stores no images with {channels} channels; use .png or .npy")
    sides = math.ceil(count / columns) * (size[0] + GRID_GAP), columns * (size[1] + GRID_GAP)
    if math.prod(sides) > MAX_GRID_PIXELS or max(sides) > kind.longest_side:
        raise InvalidInputError(
            f"--out {out}: an image grid of {count} images has {sides[0]}x{sides[1]} pixels, which is too large; "
            "give a folder, as in --out DIR/, or a .npy file"
        )


def check_writable(out: str) -> None:
    """Make the folder that will be written to; raise InvalidInputError if no file can be written there."""
    folder = Path(out) if is_folder(out) else Path(out).parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InvalidInputError(f"--out {out}: cannot be written ({error.strerror}); choose another path") from error


def open_output(
    out: str, count: int, records: Iterator[Record], data_range: tuple[float, float]
) -> AbstractContextManager[Write]:
    """Open an output that `check_output` accepts; the context gives `write(samples)`, to be called for each batch.

    Args:
        out: The path.
        count: Number of samples that will be written.
        records: Their records, in order.
        data_range: Lowest and highest value of a picture.
    """
    if is_folder(out):
        return _folder(Path(out), records, data_range)
    return _array(Path(out), count) if is_array(out) else _grid(Path(out), records, data_range)


@contextmanager
def _folder(folder: Path, records: Iterator[Record], data_range: tuple[float, float]) -> Iterator[Write]:
    def write(samples: np.ndarray) -> None:
        pictures = to_uint8(samples, data_range)
        for pixels, record in zip(pictures, records, strict=False):  # takes no record of a later batch
            write_image(pixels, image_path(folder, record), record)

    yield write


@contextmanager
def _grid(path: Path, records: Iterator[Record], data_range: tuple[float, float]) -> Iterator[Write]:
    pixels: list[np.ndarray] = []
    yield lambda samples: pixels.append(to_uint8(samples, data_range))
    write_image(image_grid(np.concatenate(pixels)), path, common_record(records))


@contextmanager
def _array(path: Path, count: int) -> Iterator[Write]:
    with atomic(path) as temporary, ExitStack() as stack:
        if _suffix(str(path)) == ".npz":
            archive = stack.enter_context(zipfile.ZipFile(temporary, "w"))
            file: Any = stack.enter_context(archive.open(f"{ARRAY_NAME}.npy", "w", force_zip64=True))
        else:
            file = stack.enter_context(temporary.open("wb"))
        started = False

        def write(samples: np.ndarray) -> None:
            nonlocal started
            if not started:
                header = {"descr": "<f4", "fortran_order": False, "shape": (count, *samples.shape[1:])}
                np.lib.format.write_array_header_1_0(file, header)
                started = True
            file.write(np.ascontiguousarray(samples, "<f4").tobytes())

        yield write


def _suffix(out: str) -> str:
    return Path(out).suffix.lower()
