"""Images out: float arrays to 8-bit pixels, many images to one PNG grid, written whole or not at all.

pixel = round(255 (x - low) / (high - low)),  clipped to 0..255
"""

from __future__ import annotations

import math
import os
import tempfile
from pathlib import Path

import numpy as np

from diffpress.runtime.errors import InvalidInputError


def to_uint8(images: np.ndarray, data_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """Float images [N, C, H, W] to uint8 [N, H, W, C]; values out of range are clipped, NaN becomes black."""
    low, high = data_range
    scaled = np.nan_to_num((images.astype(np.float32) - low) * (255.0 / (high - low)), nan=0.0)
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def image_grid(pixels: np.ndarray, columns: int | None = None, gap: int = 2) -> np.ndarray:
    """uint8 [N, H, W, C] to one image [rows (H + gap) - gap, columns (W + gap) - gap, C]; about square by
    default.

    Raises InvalidInputError for no images or no columns.
    """
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else min(columns, count)
    if columns < 1:
        raise InvalidInputError(f"a grid of {count} images in {columns} columns: both must be at least 1")
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, height + gap, width + gap, channels), 255, dtype=np.uint8)
    tiles[:count, :height, :width] = pixels
    joined = tiles.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    whole = joined.reshape(rows * (height + gap), columns * (width + gap), channels)
    return whole[: whole.shape[0] - gap, : whole.shape[1] - gap]


def write_png(pixels: np.ndarray, path: Path) -> None:
    """Write uint8 [H, W, 1, 3 or 4]: readers see the old file or the whole new one; InvalidInputError if it cannot."""
    from PIL import Image

    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".part", delete=False) as file:
            temporary = Path(file.name)
        try:
            image.save(temporary, format="PNG")
            temporary.chmod(0o666 & ~_umask())  # a temporary file is private; the grid is as readable as any file
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise InvalidInputError(
            f"{path}: cannot be written ({error.strerror or error}); choose another place"
        ) from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
