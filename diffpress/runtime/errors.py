"""Exceptions of diffpress: each message states what is wrong, where, and what to do.

The command line prints a `DiffpressError` as one line and exits with its code; a traceback means a bug in diffpress.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class DiffpressError(Exception):
    """Base class of all errors whose message is meant for the user.

    Examples:
        >>> import diffpress as dp
        >>> try:
        ...     dp.load("nowhere")
        ... except dp.DiffpressError as error:
        ...     print(error.exit_code)
        2
    """

    exit_code = 2


class InvalidInputError(DiffpressError):
    """A file, flag or value cannot be used.

    Examples:
        >>> import diffpress as dp
        >>> try:
        ...     dp.SamplingPlan("ddim", (1.0, 2.0))
        ... except dp.InvalidInputError as error:
        ...     print(str(error)[:15])
        plan: timesteps
    """


class EngineUnavailableError(InvalidInputError):
    """An engine cannot run a graph on this machine, in this version or with these options; another engine may.

    Examples:
        >>> import diffpress as dp
        >>> issubclass(dp.EngineUnavailableError, dp.InvalidInputError)
        True
    """


def unknown_name(what: str, name: str, known: Iterable[str]) -> InvalidInputError:
    """Return the error for an unknown name, which suggests the nearest match or lists all valid names."""
    names = list(known)
    spelled = name.lower().replace("+", "p").replace("-", "_").replace(" ", "_")  # DPM++ 2M is dpmpp_2m
    near = difflib.get_close_matches(spelled, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(names)}"
    return InvalidInputError(f"unknown {what} '{name}': {hint}")


class MissingDependencyError(DiffpressError):
    """A required package is missing; `extra` installs it, or diffpress itself if `extra` is None.

    Examples:
        >>> import diffpress as dp
        >>> print(dp.MissingDependencyError("openvino", "openvino", "--engine openvino"))
        --engine openvino needs the package 'openvino': pip install 'diffpress[openvino]'
    """

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        requirement = f"'diffpress[{extra}]'" if extra else "diffpress"
        super().__init__(f"{purpose} needs the package '{package}': pip install {requirement}")


class GateFailedError(DiffpressError):
    """A gate of the recipe failed; the output is kept.

    Examples:
        >>> import diffpress as dp
        >>> dp.GateFailedError.exit_code
        1
    """

    exit_code = 1


EXTRAS = {
    "compress": (
        "torch",
        "diffusers",
        "transformers",
        "peft",
        "sentencepiece",
        "safetensors",
        "accelerate",
        "modelopt",
        "torch_pruning",
        "onnx",
        "onnxscript",
        "pydantic",
        "rich",
        "yaml",
        "torchmetrics",
    ),
    "openvino": ("openvino",),
    "tensorrt": ("tensorrt_rtx", "tensorrt", "cuda"),
    "text": ("tokenizers",),
    "serve": ("starlette", "uvicorn", "prometheus_client"),
    "search": ("optuna",),
    "sign": ("cryptography",),
    "genai": ("openvino_tokenizers",),
}


def extra_for(error: ModuleNotFoundError, purpose: str) -> MissingDependencyError | None:
    """Convert a failed import to a readable error; None if the package belongs to no extra of diffpress."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return MissingDependencyError(package, extra, purpose) if extra else None
