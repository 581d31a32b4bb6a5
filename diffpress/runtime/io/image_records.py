"""Records: how each sample in a folder was made, stored as the text entries of its PNG.

A record has the prompt, the seed, the sampling plan and the bundle's hash, so that an image can be made again, and so
that an interrupted run knows which of its images are finished.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.open_image import IMAGE_ERRORS, open_image

Record = Mapping[str, str]

SEED = "seed"
KEYS = (
    "prompt",
    "negative_prompt",
    "label",
    "conditioning",
    "image",
    "mask",
    "strength",
    "overlay",
    "control",
    "loras",
    SEED,
    "solver",
    "steps",
    "timesteps",
    "guidance",
    "step_cache",
    "size",
    "engine",
    "precision",
    "bundle",
)


def image_path(folder: Path, record: Record) -> Path:
    """Return the file of a sample in a folder, which is named by its seed."""
    return folder / f"{int(record[SEED]):06d}.png"


def is_finished(folder: Path, record: Record) -> bool:
    """Return whether the sample is in the folder already.

    Raises:
        InvalidInputError: The file of that name was made otherwise.
    """
    file = image_path(folder, record)
    try:
        with open_image(file) as image:
            found = image.info
    except FileNotFoundError:
        return False
    except IMAGE_ERRORS as error:
        raise InvalidInputError(f"{file}: exists and is no image of diffpress; choose another --out") from error
    other = next((key for key in KEYS if record.get(key) != found.get(key)), None)
    if other is not None:
        there, here = (_brief(values.get(other)) for values in (found, record))
        raise InvalidInputError(
            f"{file}: was made with other settings ({other}: {there} there, {here} here); choose another --out"
        )
    return True


def common_record(records: Iterable[Record]) -> dict[str, str]:
    """Return the entries that all records share, and the range of their seeds."""
    first, *others = records
    shared = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    return {**shared, SEED: f"{first[SEED]}..{others[-1][SEED]}"} if others else shared


def _brief(value: str | None) -> str:
    text = "none" if value is None else " ".join(value.split())
    return text if len(text) <= 40 else f"{text[:40]}..."
