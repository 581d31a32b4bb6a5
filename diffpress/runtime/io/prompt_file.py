"""Prompts in a text file, one per line."""

from __future__ import annotations

from pathlib import Path

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_limited

MAX_BYTES = 2**28


def read_prompt_file(path: Path) -> tuple[str, ...]:
    """Read the prompts of a UTF-8 text file; empty lines are left out.

    Raises:
        InvalidInputError: The file is not readable or contains no prompts.
    """
    try:
        lines = [line.strip() for line in read_limited(path, MAX_BYTES, "prompts").decode("utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise InvalidInputError(f"{path}: not readable as a text file of prompts ({error})") from error
    prompts = tuple(line for line in lines if line)
    if not prompts:
        raise InvalidInputError(f"{path}: contains no prompts; write one per line")
    return prompts
