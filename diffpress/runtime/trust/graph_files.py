"""Files that an ONNX graph refers to, read from its protobuf wire format without the package `onnx`.

    model.graph(7).initializer(5)                   tensor.external_data(13): {key "location", value file}
    model.graph.node(1).attribute(5).t / .g / ...   tensors and subgraphs of nodes, to any depth
    model.functions(25).node(7)                     the same in functions

Engines open these files themselves, and not every engine refuses a path that leads out of the graph's folder.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from diffpress.runtime.errors import InvalidInputError

Buffer = mmap.mmap | bytes
# message -> number of a field -> the message that it holds (onnx.proto)
MESSAGES: dict[str, dict[int, str]] = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "function": {7: "node", 11: "attribute"},
    "node": {4: "operator", 5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
    "tensor": {13: "external"},
}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
REFUSED_OPERATOR = b"EPContext"  # its attribute names a file of machine code, which an execution provider loads


def check_graph_files(graph: Path, folder: Path, listed: dict[str, object]) -> None:
    """Check that an ONNX file of a bundle refers only to files that the bundle's manifest lists.

    Args:
        graph: The ONNX file.
        folder: The bundle's folder.
        listed: The manifest's `files`.

    Raises:
        InvalidInputError: It refers to another file or runs compiled code, or is no ONNX file.
    """
    if graph.suffix != ".onnx":  # other suffixes select other formats in the engines
        raise InvalidInputError(f"{graph}: a graph of a bundle is an .onnx file; export the bundle again")
    parent = PurePosixPath(graph.relative_to(folder).as_posix()).parent
    for location in external_files(graph):
        path = PurePosixPath(location)
        if path.is_absolute() or ".." in path.parts or str(parent / path) not in listed:
            raise InvalidInputError(
                f"{graph}: its weights are in {location!r}, which the manifest does not list; export the bundle again"
            )


def external_files(graph: Path) -> list[str]:
    """Return the distinct external data locations of an ONNX file, as they are written there.

    Raises:
        InvalidInputError: The file is not in protobuf's wire format, or has the operator EPContext.
    """
    if graph.stat().st_size == 0:
        raise InvalidInputError(f"{graph}: is empty; export it again")
    found: dict[str, None] = {}
    with graph.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        try:
            for message, start, end in _messages(data):
                if message == "operator" and data[start:end] == REFUSED_OPERATOR:
                    raise InvalidInputError(
                        f"{graph}: has the operator EPContext, which loads machine code; export the bundle again"
                    )
                if message == "external" and (location := _location(data, start, end)) is not None:
                    found[location] = None
        except (IndexError, ValueError) as error:
            raise InvalidInputError(f"{graph}: not readable as ONNX ({error}); export it again") from error
    return list(found)


def _messages(data: Buffer) -> Iterator[tuple[str, int, int]]:
    """Yield (message, start, end) of all messages in MESSAGES, and of the leaves 'external' and 'operator'."""
    pending = [("model", 0, len(data))]
    while pending:
        message, start, end = pending.pop()
        yield message, start, end
        kinds = MESSAGES.get(message)
        if kinds is not None:
            pending += [
                (kinds[number], first, last) for number, first, last in _fields(data, start, end) if number in kinds
            ]


def _fields(data: Buffer, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield (number, start, end) of the length-delimited fields of a message; raises ValueError if it is malformed."""
    at = start
    while at < end:
        tag, at = _varint(data, at)
        number, kind = tag >> 3, tag & 7
        if kind == VARINT:
            _, at = _varint(data, at)
        elif kind in (FIXED64, FIXED32):
            at += 8 if kind == FIXED64 else 4
        elif kind == BYTES:
            length, at = _varint(data, at)
            if at + length > end:
                raise ValueError(f"a field at byte {at} ends outside its message")
            yield number, at, at + length
            at += length
        else:
            raise ValueError(f"wire type {kind} at byte {at}")
    if at > end:
        raise ValueError(f"a message ends at byte {at}, outside its length")


def _varint(data: Buffer, at: int) -> tuple[int, int]:
    """Return an unsigned integer of at most 64 bits and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError(f"an integer at byte {at} is longer than 64 bits")


def _location(data: Buffer, start: int, end: int) -> str | None:
    """Return the value of an entry of external_data whose key is 'location'."""
    entry = {number: bytes(data[first:last]) for number, first, last in _fields(data, start, end)}
    return entry.get(2, b"").decode("utf-8") if entry.get(1) == b"location" else None
