"""Tensor names and shapes of a safetensors file, read from its header."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffpress.runtime.errors import InvalidInputError


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor; only the header is read."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"{file}: not readable as safetensors ({error}); it may be truncated, copy it again"
        ) from error
