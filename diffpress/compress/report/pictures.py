"""Pairs of pictures from the same noise, as data URIs that fit into the page: teacher, bundle, and their difference."""

from __future__ import annotations

import base64
import io
from typing import NamedTuple

import numpy as np
from PIL import Image

from diffpress.compress.workspace import Workspace
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import read_npz

SHOWN = 8
MAX_BYTES = 1_500_000  # of all pictures of a page
MAX_SIDE = 512  # pixels; larger pictures are reduced
EXACT_SIDE = 128  # pixels; up to here pictures are PNG, larger ones JPEG
GAIN = 2  # of the difference image


class Pair(NamedTuple):
    """Pictures of one noise as data URIs, with the prompt if there is one, and the PSNR between the two in dB."""

    number: int
    prompt: str
    teacher: str
    bundle: str
    difference: str
    psnr_db: float


def pairs_of(run: Workspace) -> list[Pair]:
    """Return the first pairs of a run that fit into MAX_BYTES; none if it stored no pictures.

    Raises:
        InvalidInputError: The stored pictures cannot be read.
    """
    if not run.pairs.is_file():
        return []
    arrays = read_npz(run.pairs, ("teacher", "bundle", "prompts"))
    teacher, bundle = (arrays.get(name, np.zeros(0)) for name in ("teacher", "bundle"))
    if teacher.dtype != np.uint8 or teacher.shape != bundle.shape or teacher.dtype != bundle.dtype or teacher.ndim != 4:
        raise InvalidInputError(
            f"{run.pairs}: expected arrays 'teacher' and 'bundle', uint8 [N, H, W, C]; delete it and rerun compress"
        )
    prompts = [str(prompt) for prompt in arrays.get("prompts", ())]
    found: list[Pair] = []
    size = 0
    for number, (theirs, ours) in enumerate(zip(teacher[:SHOWN], bundle[:SHOWN], strict=True)):
        change = np.abs(theirs[..., :3].astype(int) - ours[..., :3])
        difference = np.minimum(GAIN * change, 255).astype(np.uint8)
        uris = (_data_uri(theirs), _data_uri(ours), _data_uri(difference))
        size += sum(map(len, uris))
        if size > MAX_BYTES and found:
            break
        error = float(np.square(change / 255.0).mean())
        psnr_db = float("inf") if error == 0 else -10.0 * float(np.log10(error))
        found.append(Pair(number, prompts[number] if number < len(prompts) else "", *uris, psnr_db))
    return found


def arrays_of(run: Workspace) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the samples of teacher and bundle [N, ...] of a run whose samples are no pictures."""
    if not run.comparison_arrays.is_file():
        return None
    arrays = read_npz(run.comparison_arrays, ("teacher", "bundle"))
    if arrays.keys() != {"teacher", "bundle"} or arrays["teacher"].shape != arrays["bundle"].shape:
        raise InvalidInputError(
            f"{run.comparison_arrays}: two arrays of one shape expected; delete it and compress again"
        )
    return arrays["teacher"], arrays["bundle"]


def grid_of(run: Workspace) -> str | None:
    """Return the comparison image of a run that stored no single pictures, as earlier versions did."""
    if run.pairs.is_file() or not run.comparison.is_file():
        return None
    return f"data:image/png;base64,{base64.b64encode(run.comparison.read_bytes()).decode()}"


def _data_uri(pixels: np.ndarray) -> str:
    """Return uint8 [H, W, C] as a data URI."""
    image = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    is_small = max(image.size) <= EXACT_SIDE
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    data = io.BytesIO()
    if is_small or image.mode == "RGBA":
        image.save(data, "PNG", optimize=True)
    else:
        image.save(data, "JPEG", quality=85)
    kind = "png" if is_small or image.mode == "RGBA" else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(data.getvalue()).decode()}"
