"""A hub id -> the folder of its pipeline in the local cache, by diffusers' own download."""

from __future__ import annotations

from pathlib import Path

from diffpress.compress.sources.layout import first_line
from diffpress.runtime.errors import InvalidInputError


def downloaded(hub_id: str) -> Path:
    """The folder of a hub id's pipeline in the local cache, safetensors only."""
    from diffusers import DiffusionPipeline

    try:
        return Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{hub_id}: no such folder here, and the hub did not give it ({first_line(error)})"
        ) from error
