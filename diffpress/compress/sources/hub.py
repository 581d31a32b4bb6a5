"""Download a pipeline, or a single model, from the Hugging Face hub, with its licence."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from diffpress.compress.sources.layout import first_line
from diffpress.compress.sources.terms import CARD, PATTERNS
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)


HUB_ID = re.compile(r"(?!\.)[\w.-]+/[\w.-]+")  # owner/name
MODEL_FILES = (
    "config.json",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model-*.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)


def download_model(hub_id: str, what: str) -> Path:
    """Download a single model (safetensors only) with its licence, and return its folder in the local cache.

    `what` names it in messages.
    """
    from huggingface_hub import snapshot_download

    if not HUB_ID.fullmatch(hub_id):
        raise InvalidInputError(f"{what} {hub_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(snapshot_download(hub_id, allow_patterns=[*MODEL_FILES, *PATTERNS, CARD]))
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{what} {hub_id}: no such local folder, and the download from the hub failed ({first_line(error)})"
        ) from error


def download_pipeline(hub_id: str) -> Path:
    """Download a pipeline (safetensors only) and return its folder in the local cache."""
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    try:
        folder = Path(DiffusionPipeline.download(hub_id, use_safetensors=True))
    except Exception as error:  # the hub client raises dozens of unrelated types
        raise InvalidInputError(
            f"{hub_id}: no such local folder, and the download from the hub failed ({first_line(error)})"
        ) from error
    try:
        snapshot_download(hub_id, revision=folder.name, allow_patterns=[*PATTERNS, CARD])
    except Exception as error:  # the pipeline may be in the cache without them, and the hub out of reach
        logger.warning(f"{hub_id}: its licence could not be downloaded, bundles will lack it ({first_line(error)})")
    return folder
