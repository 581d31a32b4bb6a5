"""Graphs whose time gives the peaks of a machine: large products of a type, and a copy that is bound by memory.

    product        x [rows, depth] W [depth, rows]
    convolution    x [1, channels, SIDE, SIDE], 3 x 3, to as many channels
    copy           relu(x) of a tensor of a given size

int8 has Q/DQ pairs around the operation and int8 weights, as the exported graphs have.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from diffpress.runtime.engines.executed_layers import INT8
from diffpress.runtime.io.onnx_wire import Attribute, Node, model_bytes

SIDE = 32
SIZES = {"fp32": (512, 1024, 128)}  # type -> rows, depth, channels: large enough to be fast, and done in a few ms
FAST = (1024, 2048, 256)  # of other types, which processors multiply several times as fast
SCALE, ZERO = np.float32(0.02), np.uint8(128)


def product_graph(kind: str) -> tuple[bytes, tuple[int, ...]]:
    """Return the ONNX file of the matrix product and the shape of its input 'x'; `kind` is the type of its weights."""
    rows, depth, _ = SIZES.get(kind, FAST)
    return _graph("MatMul", kind, (rows, depth), (depth, rows), (rows, rows), {})


def convolution_graph(kind: str) -> tuple[bytes, tuple[int, ...]]:
    """Return the ONNX file of the convolution and the shape of its input 'x'; `kind` is the type of its weights."""
    *_, channels = SIZES.get(kind, FAST)
    image = (1, channels, SIDE, SIDE)
    attributes = {"kernel_shape": (3, 3), "pads": (1, 1, 1, 1)}
    return _graph("Conv", kind, image, (channels, channels, 3, 3), image, attributes)


def copy_graph(size: int) -> tuple[bytes, tuple[int, ...]]:
    """Return the ONNX file of a copy of `size` bytes, half of them read and half written, and its input's shape."""
    shape = (1, size // 8)
    return model_bytes([(Node("Relu", "copy", ("x",), ("y",)), {})], {}, {"x": shape}, {"y": shape}), shape


def _graph(
    operator: str,
    kind: str,
    shape: tuple[int, ...],
    weight: tuple[int, ...],
    out: tuple[int, ...],
    attributes: Mapping[str, Attribute],
) -> tuple[bytes, tuple[int, ...]]:
    integers = np.random.default_rng(0).integers(-64, 65, weight, dtype=np.int8)
    if kind != INT8:
        node = Node(operator, "product", ("x", "w"), ("y",))
        weights = {"w": integers.astype(np.float32) * SCALE}
        return model_bytes([(node, attributes)], weights, {"x": shape}, {"y": out}), shape
    nodes: list[tuple[Node, Mapping[str, Attribute]]] = [
        *_rounded("x"),
        (Node("DequantizeLinear", "w/DQ", ("w", "scale", "none"), ("w/float",)), {}),
        (Node(operator, "product", ("x/float", "w/float"), ("out",)), attributes),
        *_rounded("out"),
        (Node("Relu", "last", ("out/float",), ("y",)), {}),
    ]
    constants: dict[str, np.ndarray] = {"scale": np.array(SCALE), "zero": np.array(ZERO), "none": np.array(0, np.int8)}
    return model_bytes(nodes, {"w": integers} | constants, {"x": shape}, {"y": out}), shape


def _rounded(name: str) -> list[tuple[Node, Mapping[str, Attribute]]]:
    return [
        (Node("QuantizeLinear", f"{name}/Q", (name, "scale", "zero"), (f"{name}/integers",)), {}),
        (Node("DequantizeLinear", f"{name}/DQ", (f"{name}/integers", "scale", "zero"), (f"{name}/float",)), {}),
    ]
