"""ONNX graph whose weights are read lazily, so that a model is never held in memory twice.

    proto     nodes, inputs, outputs, constants; for each layer weight a stub (name, dtype, shape, no bytes)
    weights   stub name -> Weight, whose read() creates the array when it is written

A file is written in one pass, one array at a time, in one of two forms:

    inline    graph.onnx alone: a protobuf message is a sequence of (tag, length, bytes), so it can be streamed
    external  graph.onnx with references to a data file: [weight | zero padding up to the next page]*
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

# a protobuf message is limited to 2 GiB, and the graph itself needs some of it
MAX_INLINE_BYTES = 2**31 - 2**24

# tensors up to this size are never stored in a data file
SMALL_BYTES = 1024

# ONNX recommends page-aligned offsets, so that an engine can memory-map the file
PAGE = 4096

# field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
GRAPH_FIELD, INITIALIZER_FIELD, RAW_DATA_FIELD = 7, 5, 9
LENGTH_DELIMITED = 2

# 4-bit types, which ml_dtypes stores in one byte each
FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")


class Weight(NamedTuple):
    """Lazily read tensor.

    `read` returns the array in this dtype (ml_dtypes for bfloat16 and similar) and shape; it may be a view.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in a file, where two 4-bit numbers share one byte."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return -(-count // 2) if self.dtype.name in FOUR_BITS else count * self.dtype.itemsize


@dataclass(frozen=True)
class Graph:
    """ONNX graph whose weights are stored outside the proto (see the module docstring).

    Weights made from a torch model refer to its tensors: the graph keeps the model alive and sees later changes to it.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Weight] = field(default_factory=dict)


def stub(name: str, weight: Weight) -> TensorProto:
    """Return the initializer that represents `weight` in a proto, without its bytes."""
    data_type = helper.np_dtype_to_tensor_dtype(weight.dtype)
    return TensorProto(name=name, data_type=data_type, dims=weight.shape, data_location=TensorProto.EXTERNAL)


def weight_of(graph: Graph, name: str) -> Weight:
    """Return any initializer of the graph as a `Weight`, including those stored in the proto.

    Raises:
        KeyError: If the graph has no initializer of that name.
    """
    if name in graph.weights:
        return graph.weights[name]
    tensor = next((tensor for tensor in graph.proto.graph.initializer if tensor.name == name), None)
    if tensor is None:
        raise KeyError(name)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Weight(dtype, tuple(tensor.dims), partial(numpy_helper.to_array, tensor))


def load_all(graph: Graph) -> onnx.ModelProto:
    """Return a proto that contains every weight. For small graphs and tests."""
    proto = _copied(graph.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in graph.weights:
            _fill_(tensor, graph.weights[tensor.name])
    return proto


def save_graph(graph: Graph, path: Path, *, data: str | None = None, beside: Path | None = None) -> int:
    """Check the graph and write it to `path`, reading one weight at a time.

    The same graph always gives the same bytes.

    Args:
        graph: The graph to write.
        path: The ONNX file.
        data: File for the weights, relative to the folder of `path` ('unet/model.onnx_data'). By default they are
            stored in `path` itself, or in `path`.data if the graph exceeds the protobuf size limit.
        beside: A written graph in the same folder. Weights that its data file holds under the same name, with the same
            bytes, are not stored again; the others are stored in `data`.

    Returns:
        The number of bytes written.

    Raises:
        onnx.checker.ValidationError: If the graph is invalid.
    """
    check_graph(graph)
    if data is None and beside is None and _inline_bytes(graph) <= MAX_INLINE_BYTES:
        with path.open("wb") as file:
            _write_inline(graph, file)
        return path.stat().st_size
    data = data or f"{path.name}.data"
    _write_external(graph, path, data, {} if beside is None else _external(beside))
    return path.stat().st_size + ((path.parent / data).stat().st_size if (path.parent / data).is_file() else 0)


def write_linked_graph(path: Path, view: Path) -> None:
    """Write the graph of `path` also to `view`, a second small file that refers to the same data file.

    Raises:
        ValueError: If the data is not in the folder of `view` or below it; ONNX does not allow references upwards.
    """
    proto = onnx.load(path, load_external_data=False)
    for tensor in proto.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location":
                entry.value = (path.parent / entry.value).relative_to(view.parent).as_posix()
    view.write_bytes(proto.SerializeToString(deterministic=True))


def _copied(proto: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    return copy


def check_graph(graph: Graph) -> None:
    """Check that the graph is valid ONNX without reading a weight.

    Weights are passed to the checker as inputs of their dtype and shape.

    Raises:
        onnx.checker.ValidationError: If the graph is invalid.
    """
    proto = _copied(graph.proto)
    del proto.graph.initializer[:]
    for tensor in graph.proto.graph.initializer:
        if tensor.name in graph.weights:
            proto.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            proto.graph.initializer.append(tensor)
    onnx.checker.check_model(proto)


def _inline_bytes(graph: Graph) -> int:
    return graph.proto.ByteSize() + sum(weight.nbytes for weight in graph.weights.values())


def _write_inline(graph: Graph, file: BinaryIO) -> None:
    """Stream the message of `load_all(graph)`, except that weights follow the other initializers."""
    outer, inner = _copied(graph.proto), onnx.GraphProto()
    outer.ClearField("graph")
    inner.CopyFrom(graph.proto.graph)
    del inner.initializer[:]
    inner.initializer.extend(t for t in graph.proto.graph.initializer if t.name not in graph.weights)
    body, heads = inner.SerializeToString(deterministic=True), {}
    for tensor in graph.proto.graph.initializer:
        if tensor.name in graph.weights:
            size = graph.weights[tensor.name].nbytes
            head = TensorProto(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            start = head.SerializeToString(deterministic=True) + _tag(RAW_DATA_FIELD, size)
            heads[tensor.name] = _tag(INITIALIZER_FIELD, len(start) + size) + start
    total = len(body) + sum(len(head) + graph.weights[name].nbytes for name, head in heads.items())
    file.write(outer.SerializeToString(deterministic=True) + _tag(GRAPH_FIELD, total) + body)
    for name, head in heads.items():
        file.write(head)
        file.write(_bytes(name, graph.weights[name]))


def _tag(number: int, length: int) -> bytes:
    """Return a field's header: its number and its length in bytes as varints (7 bits per byte, low first)."""
    out = bytearray()
    for value in (number << 3 | LENGTH_DELIMITED, length):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _write_external(graph: Graph, path: Path, data: str, stored: Mapping[str, TensorProto]) -> None:
    """Write the graph with weights in `data`, except those in the data file that `stored` tensors refer to."""
    proto = _copied(graph.proto)
    (path.parent / data).parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / data).open("wb") as file:
        for tensor in proto.graph.initializer:
            weight = weight_of(graph, tensor.name)
            if weight.nbytes <= SMALL_BYTES:
                _fill_(tensor, weight)
                continue
            content, held = _bytes(tensor.name, weight), stored.get(tensor.name)
            if held is not None and _is_stored(held, weight, content, path.parent):
                tensor.CopyFrom(held)
                continue
            tensor.CopyFrom(stub(tensor.name, weight))
            file.write(bytes(-file.tell() % PAGE))
            for key, value in (("location", data), ("offset", file.tell()), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(content)
        is_empty = bool(stored) and file.tell() == 0
    if is_empty:
        (path.parent / data).unlink()
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _external(path: Path) -> dict[str, TensorProto]:
    """Return the initializers of a written graph that are in a data file, by name."""
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    return {tensor.name: tensor for tensor in tensors if tensor.external_data}


def _is_stored(held: TensorProto, weight: Weight, content: memoryview, folder: Path) -> bool:
    """Return whether a tensor of a written graph is this weight, byte for byte."""
    where = {entry.key: entry.value for entry in held.external_data}
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    if held.data_type != kind or tuple(held.dims) != weight.shape or int(where["length"]) != len(content):
        return False
    with (folder / where["location"]).open("rb") as file:
        file.seek(int(where["offset"]))
        return file.read(len(content)) == content


def _fill_(tensor: TensorProto, weight: Weight) -> None:
    tensor.CopyFrom(numpy_helper.from_array(_array(tensor.name, weight), tensor.name))


def _bytes(name: str, weight: Weight) -> memoryview:
    # viewed as bytes because ml_dtypes arrays have no buffer protocol; a transposed array is copied here
    stored = np.ascontiguousarray(_array(name, weight)).reshape(-1).view(np.uint8)
    return (_packed(stored) if weight.dtype.name in FOUR_BITS else stored).data


def _packed(numbers: np.ndarray) -> np.ndarray:
    """Pack uint8 [N] with 4 significant bits into uint8 [ceil(N / 2)]; the first of two takes the low bits."""
    pairs = np.pad(numbers, (0, numbers.size % 2)).reshape(-1, 2) & 0x0F
    return pairs[:, 0] | pairs[:, 1] << 4


def _array(name: str, weight: Weight) -> np.ndarray:
    array = weight.read()
    if array.dtype != weight.dtype or array.shape != weight.shape:
        raise ValueError(
            f"weight '{name}' is {array.dtype} {array.shape}, but was {weight.dtype} {weight.shape} when traced; "
            "export again after changing the model"
        )
    return array
