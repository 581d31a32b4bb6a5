"""One small family of errors: each message says what was wrong, where, and what to do about it.

The command line turns a `DiffpressError` into that one line and its exit code; a traceback means a defect of
ours.
"""

from __future__ import annotations

import difflib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class DiffpressError(Exception):
    """Base of all errors that are meant to be read by a person."""

    exit_code = 2


class InvalidInputError(DiffpressError):
    """A file, a flag or a value that cannot be used."""


class EngineUnavailableError(InvalidInputError):
    """An engine cannot run this on this machine, in this version or with these options; another one may."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> InvalidInputError:
    """The error for a name that is not in a table: it names the nearest match, or all there is."""
    names = list(known)
    near = difflib.get_close_matches(name, names, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"choose from {', '.join(names)}"
    return InvalidInputError(f"unknown {what} '{name}': {hint}")


class MissingDependencyError(DiffpressError):
    """A package is not installed: one that comes with an extra, or (`extra` None) with diffpress itself."""

    def __init__(self, package: str, extra: str | None, purpose: str) -> None:
        wanted = f"'diffpress[{extra}]'" if extra else "diffpress"
        super().__init__(f"{purpose} needs the package '{package}': pip install {wanted}")


class GateFailedError(DiffpressError):
    """A gate of the recipe was not passed; the work is kept."""

    exit_code = 1


def report_error(message: str, code: int) -> int:
    """Say it on stderr, as the command line does, and give the exit code back."""
    print(f"diffpress: {message}", file=sys.stderr)
    return code


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
}


def extra_for(error: ModuleNotFoundError, purpose: str) -> MissingDependencyError | None:
    """The readable form of a failed import, where the package belongs to one of diffpress's extras."""
    package = (error.name or "").partition(".")[0]
    extra = next((extra for extra, packages in EXTRAS.items() if package in packages), None)
    return MissingDependencyError(package, extra, purpose) if extra else None


@contextmanager
def plain_warnings() -> Iterator[None]:
    """Warnings of ours as one line each on stderr, for the command line: without their place in the sources."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *place: object) -> None:
            if category is UserWarning:
                print(f"warning: {message}", file=sys.stderr)
            else:
                usual(message, category, *place)  # type: ignore[arg-type]

        warnings.showwarning = show  # type: ignore[assignment]
        warnings.simplefilter("always", UserWarning)
        yield
