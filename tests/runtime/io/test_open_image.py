"""runtime/io/open_image.py: pictures of strangers, of any claimed size and in any format."""

from __future__ import annotations

import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.request import read_image_request
from diffpress.runtime.io.open_image import MAX_PIXELS, open_image


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def png(width: int, height: int, *extra: bytes) -> bytes:
    """Return a small PNG file that claims this size."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    rows = zlib.compress(bytes(min((width + 1) * height, 2**20)))
    return b"".join([b"\x89PNG\r\n\x1a\n", head, *extra, chunk(b"IDAT", rows), chunk(b"IEND", b"")])


def refused(file: Path, content: bytes, reason: str) -> None:
    file.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(InvalidInputError, match=reason) as error:
            read_image_request(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("width", "height"), [(8193, 8192), (12_000, 12_000), (60_000, 60_000), (2**31 - 1, 1)])
def test_more_pixels_than_a_model_could_use_are_refused_before_they_are_read(
    tmp_path: Path, width: int, height: int
) -> None:
    refused(tmp_path / "a.png", png(width, height), f"pixels, more than {MAX_PIXELS}")


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_a_text_or_profile_that_expands_is_refused(tmp_path: Path, kind: bytes) -> None:
    bomb = chunk(kind, b"x\0\0" + zlib.compress(bytes(2**24), 9))
    refused(tmp_path / "a.png", png(8, 8, bomb), "too large")


def test_formats_that_pillow_opens_with_other_programs_are_not_tried(tmp_path: Path) -> None:
    refused(tmp_path / "a.png", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "cannot identify")


def test_a_large_picture_within_the_limit_opens_without_a_warning(tmp_path: Path) -> None:
    limit = Image.MAX_IMAGE_PIXELS
    (tmp_path / "a.png").write_bytes(png(8192, 8192))
    with open_image(tmp_path / "a.png") as image:
        assert image.size == (8192, 8192)
    assert limit == Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_the_usual_formats_open(tmp_path: Path, suffix: str) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint8)).save(tmp_path / f"a.{suffix}")
    with open_image(tmp_path / f"a.{suffix}") as image:
        assert image.size == (6, 4)
