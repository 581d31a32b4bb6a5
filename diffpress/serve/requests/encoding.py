"""Samples as bytes: PNG, JPEG or WebP for pictures, NumPy's .npy of float32 for any sample; base64 in JSON."""

from __future__ import annotations

import base64
import io

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.images import FORMATS as IMAGE_FORMATS
from diffpress.runtime.io.images import to_pil

ARRAY = "npy"
SUFFIXES = {"png": ".png", "jpeg": ".jpeg", "webp": ".webp"}
FORMATS = (*SUFFIXES, ARRAY)


def check_format(form: str, are_pictures: bool, shape: tuple[int, ...]) -> None:
    """Raise InvalidInputError if samples of this shape cannot be encoded in a format."""
    if form == ARRAY:
        return
    if not are_pictures:
        raise InvalidInputError(f"format {form}: the model's samples of shape {shape} are no pictures; use {ARRAY}")
    kind = IMAGE_FORMATS[SUFFIXES[form]]
    if shape[0] not in kind.channels or max(shape[1:]) > kind.longest_side:
        raise InvalidInputError(f"format {form}: cannot store images of shape {shape}; use png or {ARRAY}")


def encoded(sample: np.ndarray, form: str, data_range: tuple[float, float]) -> bytes:
    """Encode one sample [C, H, W], or of any shape for .npy.

    Args:
        sample: float32, in the data range.
        form: One of FORMATS.
        data_range: Lowest and highest value of the data.
    """
    file = io.BytesIO()
    if form == ARRAY:
        np.save(file, sample, allow_pickle=False)
        return file.getvalue()
    kind = IMAGE_FORMATS[SUFFIXES[form]]
    (image,) = to_pil(sample[None], data_range)
    image.save(file, format=kind.name, **kind.options)
    return file.getvalue()


def in_base64(sample: np.ndarray, form: str, data_range: tuple[float, float]) -> str:
    """Encode one sample as `encoded` does, in base64."""
    return base64.b64encode(encoded(sample, form, data_range)).decode("ascii")
