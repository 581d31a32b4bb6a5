"""What TensorRT's parser and builder say, as one clear line: which node, why, what to try."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import InvalidInputError

LONGEST = 300

# number types that not every GPU has: as TensorRT calls them -> (our name, least compute capability)
TYPES = {"fp8_e4m3": ("fp8", "8.9"), "fp4_e2m1": ("nvfp4", "12.0")}
HARDWARE = re.compile(r"Cannot compile for target\(s\) (?P<targets>[\w, ]+?),? because .*datatypes: (?P<types>[\w, ]+)")
# said of everything that goes wrong where there is no GPU: no reason of a failed build
NOISE = ("Thread context has not been set", "catchCudaError")
# the source line of TensorRT itself, which helps nobody here
ORIGIN = re.compile(r"^\S+: Error Code \d+: |\s*In \w+ at /_src/\S+|\[\w+\.\w+:\d+: \w+\] ")

HINTS = (
    ("Non-zero zero point", "such a graph is made for processors: export with --targets tensorrt"),
    ("No importer registered", "TensorRT has no such operator: write it with others, and export again"),
    ("Plugin not found", "TensorRT has no such operator: write it with others, and export again"),
    ("out of memory", "take a smaller batch or size, a workspace limit, or a machine with more memory"),
    ("bad_alloc", "take a smaller batch or size, or a machine with more memory"),
    ("Could not find any implementation", "try another optimization level or a larger workspace"),
)


def parse_error(graph: str, library: str, error: Any | None) -> InvalidInputError:
    """The error for a graph that the parser refused; `error` is its first one."""
    if error is None:
        return InvalidInputError(f"{graph}: {library} cannot parse it, and does not say why; export it again")
    said, node = one_line(error.desc()), ""
    if error.node_name() or error.node_operator():
        node = f"node '{error.node_name()}' ({error.node_operator()})"
    return InvalidInputError(f"{graph}: {library} cannot parse {node or 'it'}: {said}{_hint(said)}")


def build_error(graph: str, library: str, errors: Sequence[str], options: BuildOptions) -> InvalidInputError:
    """The error for a network that was not built, from all that the builder logged as errors."""
    relevant = [message for message in errors if not any(noise in message for noise in NOISE)]
    said = one_line(relevant[0] if relevant else "")
    found = HARDWARE.search(said)
    if found:
        return InvalidInputError(f"{graph}: {_hardware(library, found)}")
    if options.strip_weights and "CUDA_SUCCESS" in said:
        return InvalidInputError(
            f"{graph}: {library} needs a GPU to build a plan without weights, and there is none; "
            "build where there is one, or leave strip_weights out"
        )
    return InvalidInputError(f"{graph}: {library} cannot build it: {said}{_hint(said)}")


def one_line(text: str) -> str:
    """The message without line breaks and source lines, of a length that can be read."""
    line = ORIGIN.sub("", " ".join(text.split())).strip()
    return line[:LONGEST].rstrip(" .") or "no reason given"


def _hint(said: str) -> str:
    return next((f"; {hint}" for sign, hint in HINTS if sign in said), "")


def _hardware(library: str, found: re.Match[str]) -> str:
    targets = ", ".join(f"{sm[2:-1]}.{sm[-1]}" for sm in re.findall(r"sm\d+", found["targets"]))
    kinds = [TYPES.get(kind, (kind, "")) for kind in re.findall(r"\w+", found["types"])]
    names, least = " and ".join(name for name, _ in kinds), max((able for _, able in kinds), key=_number)
    later = f"{least} and later do: " if least else ""
    return (
        f"compute capability {targets} does not run format {names} of this graph ({library}); {later}"
        f"leave {targets} out, or quantize to int8"
    )


def _number(capability: str) -> tuple[int, ...]:
    return tuple(int(part) for part in capability.split(".")) if capability else (0,)
