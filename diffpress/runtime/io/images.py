"""Image output: float arrays to 8-bit pixels, image grids, and atomic writes of PNG, JPEG and WebP.

pixel = round(255 (x - low) / (high - low)),  clipped to 0..255
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import atomic

if TYPE_CHECKING:
    from PIL import Image

IMAGE_MODES = {"L": 1, "RGB": 3, "RGBA": 4}  # Pillow's mode -> channels
GRID_GAP = 2  # white pixels between neighbouring images


class ImageFormat(NamedTuple):
    """How Pillow writes an image file, and what the format can store."""

    name: str
    options: dict[str, Any]
    longest_side: int
    channels: tuple[int, ...] = (1, 3, 4)


_JPEG = ImageFormat("JPEG", {"quality": 95}, 2**16 - 1, (1, 3))
FORMATS = {
    "": ImageFormat("PNG", {}, 2**31 - 1),
    ".png": ImageFormat("PNG", {}, 2**31 - 1),
    ".jpg": _JPEG,
    ".jpeg": _JPEG,
    ".webp": ImageFormat("WEBP", {"quality": 95}, 2**14 - 1),
}


def to_uint8(images: np.ndarray, data_range: tuple[float, float] = (-1.0, 1.0)) -> np.ndarray:
    """Convert float images [N, C, H, W] to uint8 [N, H, W, C]; values are clipped, NaN becomes 0 (black)."""
    low, high = data_range
    scaled = np.nan_to_num((images.astype(np.float32) - low) * (255.0 / (high - low)), nan=0.0)
    return np.clip(np.round(scaled), 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)


def to_pil(images: np.ndarray, data_range: tuple[float, float] = (-1.0, 1.0)) -> list[Image.Image]:
    """Return float images [N, C, H, W] with 1, 3 or 4 channels as PIL images; InvalidInputError for other channels."""
    from PIL import Image

    if images.shape[1] not in (1, 3, 4):
        raise InvalidInputError(f"samples with {images.shape[1]} channels are not pictures; decode them first")
    pixels = to_uint8(images, data_range)
    return [Image.fromarray(array[:, :, 0] if array.shape[2] == 1 else array) for array in pixels]


def image_grid(pixels: np.ndarray, columns: int | None = None, gap: int = GRID_GAP) -> np.ndarray:
    """Arrange images in one image grid, roughly square by default.

    Args:
        pixels: uint8 [N, H, W, C].
        columns: Number of columns, at most N; None picks ceil(sqrt(N)).
        gap: White pixels between neighbouring images.

    Returns:
        uint8 [rows (H + gap) - gap, columns (W + gap) - gap, C].

    Raises:
        InvalidInputError: There are no images or no columns.
    """
    count, height, width, channels = pixels.shape
    columns = math.ceil(math.sqrt(count)) if columns is None else min(columns, count)
    if columns < 1:
        raise InvalidInputError(f"image grid of {count} images in {columns} columns: both must be at least 1")
    rows = math.ceil(count / columns)
    tiles = np.full((rows * columns, height + gap, width + gap, channels), 255, dtype=np.uint8)
    tiles[:count, :height, :width] = pixels
    joined = tiles.reshape(rows, columns, height + gap, width + gap, channels).transpose(0, 2, 1, 3, 4)
    canvas = joined.reshape(rows * (height + gap), columns * (width + gap), channels)
    return canvas[: canvas.shape[0] - gap, : canvas.shape[1] - gap]


def write_image(pixels: np.ndarray, path: Path, text: Mapping[str, str] | None = None) -> None:
    """Write an image atomically.

    Args:
        pixels: uint8 [H, W, C] with 1, 3 or 4 channels.
        path: File to write, in the format of its suffix (`FORMATS`); missing parent folders are created.
        text: Text entries of a PNG; other formats store none.

    Raises:
        InvalidInputError: The file cannot be written.
    """
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    image, kind = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), FORMATS[path.suffix.lower()]
    options = dict(kind.options)
    if text and kind.name == "PNG":
        options["pnginfo"] = PngInfo()
        for key, value in text.items():
            options["pnginfo"].add_text(key, value)  # as iTXt (UTF-8) if it is not Latin-1
    with atomic(path, errors=ValueError) as temporary:
        image.save(temporary, format=kind.name, **options)
