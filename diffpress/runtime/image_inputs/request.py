"""What a user gives to start from: images, a mask and a strength, read and checked before anything is opened.

image    a file, a PIL image, or uint8 [H, W] or [H, W, C]; a list or [N, H, W, C] for one image per sample
mask     the same, of the image's size: white (128 and above) is repainted; a list for one mask per sample
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.strength import MASKED_STRENGTH, STRENGTH, check_strength
from diffpress.runtime.io.images import IMAGE_MODES
from diffpress.runtime.io.open_image import IMAGE_ERRORS, open_image

MASK_MODES = ("1", "L", "RGB")
WHITE = 128  # the lowest value that is repainted, as in diffusers


@dataclass(frozen=True)
class ImageRequest:
    """Images to start from.

    Attributes:
        pixels: uint8 [M, H, W, C]; M is 1 for all samples, or one for each.
        masks: True where the image is repainted, bool [M, H, W]; None repaints everything.
        strength: Share of the plan's steps that is run, above 0 and at most 1.
        overlay: Put the pixels that the mask keeps over the finished image.
        prefix: What stands before the name of an argument in messages: "--" on the command line.
    """

    pixels: np.ndarray
    masks: np.ndarray | None
    strength: float
    overlay: bool = False
    prefix: str = ""

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of the images."""
        height, width = self.pixels.shape[1:3]
        return int(height), int(width)

    def facts(self) -> dict[str, str | None]:
        """Return what identifies the request, for the record of a sample."""
        masked = None if self.masks is None else hashlib.sha256(self.masks.tobytes()).hexdigest()
        return {
            "image": hashlib.sha256(self.pixels.tobytes()).hexdigest(),
            "mask": masked,
            "strength": f"{self.strength:g}",
            "overlay": "yes" if self.overlay else None,
        }


def read_image_request(
    image: Any, mask: Any = None, strength: float | None = None, overlay: bool = False, prefix: str = ""
) -> ImageRequest | None:
    """Read and check what a user gives; None if there is no image.

    Raises:
        InvalidInputError: A file cannot be read, a mode or size is wrong, the strength is outside (0, 1], or there is a
            mask or a strength without an image.
    """
    if image is None:
        for name, given in (("mask", mask is not None), ("strength", strength is not None), ("overlay", overlay)):
            if given:
                raise InvalidInputError(f"{prefix}{name}: needs an image; give one with {prefix}image")
        return None
    if overlay and mask is None:
        raise InvalidInputError(f"{prefix}overlay: needs a mask, whose black pixels it keeps; give {prefix}mask")
    chosen = (STRENGTH if mask is None else MASKED_STRENGTH) if strength is None else strength
    check_strength(chosen, f"{prefix}strength")
    pixels = read_images(image, f"{prefix}image")
    masks = None
    if mask is not None:
        masks = _stacked([_mask(one, f"{prefix}mask") for one in _listed(mask)], f"{prefix}mask")
        if masks.shape[1:] != pixels.shape[1:3]:
            raise InvalidInputError(
                f"{prefix}mask: is {size_text(masks.shape[1:])}, the image is {size_text(pixels.shape[1:3])} "
                "(height x width); give a mask of the image's size"
            )
    return ImageRequest(pixels, masks, chosen, overlay, prefix)


def read_images(value: Any, name: str) -> np.ndarray:
    """Return one image or a list of images as uint8 [M, H, W, C]; `name` is what the user calls them.

    Raises:
        InvalidInputError: One cannot be read, or they differ in size or mode.
    """
    return _stacked([_image(one, name) for one in _listed(value)], name)


def _listed(value: Any) -> list[Any]:
    """Return one entry per image."""
    if isinstance(value, np.ndarray):
        return list(value) if value.ndim == 4 else [value]
    return list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value]


def _stacked(arrays: list[np.ndarray], name: str) -> np.ndarray:
    shapes = sorted({array.shape for array in arrays})
    if len(shapes) != 1:
        found = " and ".join(size_text(shape) for shape in shapes) if shapes else "none"
        raise InvalidInputError(f"{name}: give images of one size and mode, found {found}")
    return np.stack(arrays)


def _image(value: Any, name: str) -> np.ndarray:
    """Return one image, uint8 [H, W, C]."""
    if isinstance(value, np.ndarray):
        if value.dtype != np.uint8 or value.ndim not in (2, 3):
            raise InvalidInputError(f"{name}: is {value.dtype} {list(value.shape)}; give uint8 [H, W] or [H, W, C]")
        return value if value.ndim == 3 else value[:, :, None]
    opened, name = _opened(value, name)
    if opened.mode not in IMAGE_MODES:
        raise InvalidInputError(
            f"{name}: has Pillow's mode '{opened.mode}'; convert it to {', '.join(IMAGE_MODES)}, whichever the model "
            "takes"
        )
    pixels = np.asarray(opened)
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _mask(value: Any, name: str) -> np.ndarray:
    """Return one mask, bool [H, W]."""
    if isinstance(value, np.ndarray):
        if value.dtype not in (np.uint8, np.bool_) or value.ndim != 2:
            raise InvalidInputError(f"{name}: is {value.dtype} {list(value.shape)}; give uint8 or bool [H, W]")
        return value if value.dtype == np.bool_ else value >= WHITE
    opened, name = _opened(value, name)
    if opened.mode not in MASK_MODES:
        raise InvalidInputError(f"{name}: has Pillow's mode '{opened.mode}'; convert it to L, with white to repaint")
    found: np.ndarray = np.asarray(opened.convert("L")) >= WHITE
    return found


def _opened(value: Any, name: str) -> tuple[Any, str]:
    """Return a PIL image, upright and complete, and what it is called in messages."""
    from PIL import Image, ImageOps

    if isinstance(value, Image.Image):
        return value, name
    if not isinstance(value, str | Path):
        raise InvalidInputError(f"{name}: is a {type(value).__name__}; give a file, a PIL image or a uint8 array")
    name = f"{name} {value}"
    try:
        with open_image(value) as file:
            return ImageOps.exif_transpose(file), name
    except IMAGE_ERRORS as error:
        raise InvalidInputError(f"{name}: cannot be read as an image ({error})") from error


def size_text(shape: tuple[int, ...]) -> str:
    """Return a size in words: '512x768'."""
    return "x".join(str(side) for side in shape)
