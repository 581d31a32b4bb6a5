"""ONNX files without the package onnx: read the nodes of a graph, and write graphs of a few nodes.

A protobuf message is a sequence of (field number << 3 | wire type, value); a value is a varint (type 0: 7 bits per
byte, low first) or its length and bytes (type 2). The field numbers are those of onnx.proto. Reading skips the bytes of
weights, so that a large file costs no more than its nodes.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

VARINT, FIXED_64, BYTES, FIXED_32 = 0, 1, 2, 5
MODEL_GRAPH, GRAPH_NODE = 7, 1
NODE_INPUT, NODE_OUTPUT, NODE_NAME, NODE_TYPE = 1, 2, 3, 4
IR_VERSION, OPSET = 10, 19
ELEMENT_TYPES = {np.dtype(np.float32): 1, np.dtype(np.uint8): 2, np.dtype(np.int8): 3}
INT, INTS = 2, 7  # types of attributes

Attribute = int | Sequence[int]


class Node(NamedTuple):
    """A node of a graph: its operator, its name, and the names of its inputs and outputs."""

    kind: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


def read_nodes(path: Path) -> list[Node]:
    """Return the nodes of an ONNX file's graph, in its order; those of subgraphs are left out.

    Raises:
        ValueError: The file is no protobuf message.
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        found = []
        for number, start, end in _fields(data, 0, len(data)):
            if number == MODEL_GRAPH:
                nodes = (span for span in _fields(data, start, end) if span[0] == GRAPH_NODE)
                found += [_node(data, *span[1:]) for span in nodes]
        return found


def _node(data: mmap.mmap, start: int, end: int) -> Node:
    texts: dict[int, list[str]] = {NODE_INPUT: [], NODE_OUTPUT: [], NODE_NAME: [""], NODE_TYPE: [""]}
    for number, low, high in _fields(data, start, end):
        if number in texts:
            texts[number].append(data[low:high].decode())
    inputs, outputs, name, kind = texts.values()
    return Node(kind[-1], name[-1], tuple(inputs), tuple(outputs))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number of every field of the message in data[start:end], and where its bytes begin and end."""
    while start < end:
        tag, start = _read_varint(data, start)
        kind, size = tag & 7, {FIXED_64: 8, FIXED_32: 4}.get(tag & 7)
        if kind == VARINT:
            _, stop = _read_varint(data, start)
        elif kind == BYTES:
            length, start = _read_varint(data, start)
            stop = start + length
        elif size is not None:
            stop = start + size
        else:
            raise ValueError(f"wire type {kind} at byte {start}")
        if stop > end:
            raise ValueError(f"a field ends at byte {stop}, beyond its message of {end}")
        yield tag >> 3, start, stop
        start = stop


def _read_varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """Return the number at `start` and where it ends."""
    value = shift = 0
    while start < len(data):
        byte, start = data[start], start + 1
        value |= (byte & 127) << shift
        shift += 7
        if byte < 128:
            return value, start
    raise ValueError("the file ends within a number")


def model_bytes(
    nodes: Sequence[tuple[Node, Mapping[str, Attribute]]],
    weights: Mapping[str, np.ndarray],
    inputs: Mapping[str, Sequence[int]],
    outputs: Mapping[str, Sequence[int]],
) -> bytes:
    """Return an ONNX file.

    Args:
        nodes: Nodes in the order of execution, with their attributes.
        weights: Name -> float32, int8 or uint8.
        inputs: Name -> shape, float32.
        outputs: Name -> shape, float32.
    """
    graph = b"".join(
        [
            *(_field(GRAPH_NODE, _node_bytes(node, attributes)) for node, attributes in nodes),
            _field(2, "graph"),
            *(_field(5, _weight_bytes(name, array)) for name, array in weights.items()),
            *(_field(11, _value_bytes(name, shape)) for name, shape in inputs.items()),
            *(_field(12, _value_bytes(name, shape)) for name, shape in outputs.items()),
        ]
    )
    return _field(1, IR_VERSION) + _field(8, _field(1, "") + _field(2, OPSET)) + _field(MODEL_GRAPH, graph)


def _node_bytes(node: Node, attributes: Mapping[str, Attribute]) -> bytes:
    found = [*(_field(NODE_INPUT, name) for name in node.inputs), *(_field(NODE_OUTPUT, name) for name in node.outputs)]
    found += [_field(NODE_NAME, node.name), _field(NODE_TYPE, node.kind)]
    return b"".join([*found, *(_field(5, _attribute_bytes(name, value)) for name, value in attributes.items())])


def _attribute_bytes(name: str, value: Attribute) -> bytes:
    if isinstance(value, int):
        return _field(1, name) + _field(3, value) + _field(20, INT)
    return _field(1, name) + b"".join(_field(8, one) for one in value) + _field(20, INTS)


def _weight_bytes(name: str, array: np.ndarray) -> bytes:
    shape = b"".join(_field(1, side) for side in array.shape)
    return shape + _field(2, ELEMENT_TYPES[array.dtype]) + _field(8, name) + _field(9, array.tobytes())


def _value_bytes(name: str, shape: Sequence[int]) -> bytes:
    sides = b"".join(_field(1, _field(1, side)) for side in shape)
    tensor = _field(1, ELEMENT_TYPES[np.dtype(np.float32)]) + _field(2, sides)
    return _field(1, name) + _field(2, _field(1, tensor))


def _field(number: int, value: int | str | bytes) -> bytes:
    if isinstance(value, int):
        return _varint(number << 3 | VARINT) + _varint(value)
    data = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | BYTES) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 127:
        found.append(value & 127 | 128)
        value >>= 7
    return bytes([*found, value])
