"""Convert errors of TensorRT's parser and builder to one line: which node, why, what to try."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError

LONGEST = 300

# data types that not every GPU supports: TensorRT's name -> (format name, minimum compute capability)
TYPES = {"fp8_e4m3": ("fp8", "8.9"), "fp4_e2m1": ("nvfp4", "12.0")}
HARDWARE = re.compile(r"Cannot compile for target\(s\) (?P<targets>[\w, ]+?),? because .*datatypes: (?P<types>[\w, ]+)")
# logged for any failure on a machine without a GPU; never the cause
NOISE = ("Thread context has not been set", "catchCudaError")
# source locations inside TensorRT
ORIGIN = re.compile(r"^\S+: Error Code \d+: |\s*In \w+ at /_src/\S+|\[\w+\.\w+:\d+: \w+\] ")

HINTS = (
    ("Non-zero zero point", "this graph was exported for CPUs: export with --targets tensorrt"),
    ("No importer registered", "TensorRT has no such operator: replace it by supported ones and export again"),
    ("Plugin not found", "TensorRT has no such operator: replace it by supported ones and export again"),
    ("out of memory", "use a smaller batch or size, a workspace limit, or a machine with more memory"),
    ("bad_alloc", "use a smaller batch or size, or a machine with more memory"),
    ("Could not find any implementation", "try another optimization level or a larger workspace"),
)


def parse_error(graph: str, library: str, error: Any | None) -> InvalidInputError:
    """Return the error for a graph that the parser rejected; `error` is the parser's first error."""
    if error is None:
        return InvalidInputError(f"{graph}: {library} cannot parse it and reports no reason; export it again")
    reason, node = one_line(error.desc()), ""
    if error.node_name() or error.node_operator():
        node = f"node '{error.node_name()}' ({error.node_operator()})"
    return InvalidInputError(f"{graph}: {library} cannot parse {node or 'it'}: {reason}{_hint(reason)}")


def build_error(graph: str, library: str, errors: Sequence[str], options: BuildOptions) -> InvalidInputError:
    """Return the error for a failed build, from the errors that the builder logged."""
    relevant = [message for message in errors if not any(noise in message for noise in NOISE)]
    reason = one_line(relevant[0] if relevant else "")
    found = HARDWARE.search(reason)
    if found:
        return InvalidInputError(f"{graph}: {_hardware(library, found)}")
    if options.strip_weights and "CUDA_SUCCESS" in reason:
        return InvalidInputError(
            f"{graph}: {library} needs a GPU to build an engine without weights, and there is none; "
            "build on a machine with a GPU, or omit strip_weights"
        )
    return InvalidInputError(f"{graph}: {library} cannot build it: {reason}{_hint(reason)}")


def one_line(text: str) -> str:
    """Remove line breaks and source locations from a message, and shorten it."""
    line = ORIGIN.sub("", " ".join(text.split())).strip()
    return line[:LONGEST].rstrip(" .") or "no reason given"


def _hint(reason: str) -> str:
    return next((f"; {hint}" for sign, hint in HINTS if sign in reason), "")


def _hardware(library: str, found: re.Match[str]) -> str:
    targets = ", ".join(f"{sm[2:-1]}.{sm[-1]}" for sm in re.findall(r"sm\d+", found["targets"]))
    kinds = [TYPES.get(kind, (kind, "")) for kind in re.findall(r"\w+", found["types"])]
    names, minimum = " and ".join(name for name, _ in kinds), max((lowest for _, lowest in kinds), key=_number)
    supported = f"{minimum} and later do: " if minimum else ""
    return (
        f"compute capability {targets} does not run format {names} of this graph ({library}); {supported}"
        f"omit {targets}, or quantize to int8"
    )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(number) for number in capability.split(".")) if capability else (0,)
