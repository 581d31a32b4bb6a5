"""Picture files of strangers: only the usual formats, and no more pixels than a model could use.

Pillow opens dozens of formats, some through programs such as Ghostscript, and a small file may claim any size.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
MAX_PIXELS = 2**26  # 8192 x 8192
# what Pillow raises for damaged files
IMAGE_ERRORS = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    KeyError,
    TypeError,
    OverflowError,
    MemoryError,
    struct.error,
    zlib.error,
)


@contextmanager
def open_image(file: str | Path) -> Iterator[Image.Image]:
    """Open a picture whose pixels are read on access.

    Raises:
        ValueError: It has more than MAX_PIXELS pixels.
        OSError: It is none of FORMATS, or damaged; the block may raise any of IMAGE_ERRORS.
    """
    from PIL import Image

    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = None  # Pillow only warns above its limit, and refuses above twice of it
    try:
        opened = Image.open(file, formats=FORMATS)
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    with opened as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS}")
        try:
            yield image
        except Image.DecompressionBombError as error:
            raise ValueError(str(error)) from error
