"""Names and shapes of the tensors of a safetensors file, from its header alone."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open

from diffpress.runtime.errors import InvalidInputError


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Names and shapes from the header alone."""
    try:
        with safe_open(file, framework="pt") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors}
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file}: not readable as safetensors ({error}); truncated? copy it again") from error
