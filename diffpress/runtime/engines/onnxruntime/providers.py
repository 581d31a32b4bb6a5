"""Selection and order of ONNX Runtime execution providers."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from diffpress.runtime.errors import unknown_name

CPU = "cpu"

# in order of preference; every package has the last one
PROVIDERS = {
    "tensorrt": "TensorrtExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "coreml": "CoreMLExecutionProvider",
    "directml": "DmlExecutionProvider",
    "openvino": "OpenVINOExecutionProvider",
    CPU: "CPUExecutionProvider",
}


def provider_order(requested: Sequence[str], available: Collection[str]) -> tuple[list[str], list[str]]:
    """Return the providers to try in order, and the requested ones that are not available.

    Args:
        requested: Names of PROVIDERS in order; if empty, all available providers are tried in the order of PROVIDERS.
        available: ONNX Runtime's names of the providers in its package.

    Returns:
        The names to try, which always include the CPU as a fallback, and the requested names that are missing.

    Raises:
        InvalidInputError: A requested name is unknown.
    """
    for name in requested:
        if name not in PROVIDERS:
            raise unknown_name("provider", name, PROVIDERS)
    candidates = list(dict.fromkeys(requested or PROVIDERS))
    found = [name for name in candidates if PROVIDERS[name] in available]
    missing = [name for name in candidates if requested and name not in found]
    return [*found, *([] if CPU in found else [CPU])], missing
