"""An ONNX graph whose weights stay where they are until they are written: never a second copy of a model in memory.

    proto     nodes, inputs, outputs, constants; of each layer's weight a stub (name, dtype, shape, no bytes)
    weights   name of the stub -> Weight, whose read() makes the one array that is being written

A file is written in one pass, one array after the other, in one of two forms:

    inline    graph.onnx alone: a protobuf message is a sequence of (tag, length, bytes), so it can be streamed
    external  graph.onnx with references to a data file: [weight | zeros up to the next page]*
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

# protobuf cannot hold a message of 2 GiB; the graph itself needs some of it
MAX_INLINE_BYTES = 2**31 - 2**24

# what is not larger never goes to a data file
SMALL_BYTES = 1024

# ONNX asks that offsets be multiples of a page, so that an engine can map the file instead of reading it
PAGE = 4096

# field numbers of onnx.proto: ModelProto.graph, GraphProto.initializer, TensorProto.raw_data
GRAPH_FIELD, INITIALIZER_FIELD, RAW_DATA_FIELD = 7, 5, 9
LENGTH_DELIMITED = 2

# types that ml_dtypes keeps in a byte each
FOUR_BITS = ("int4", "uint4", "float4_e2m1fn")


class Weight(NamedTuple):
    """A tensor that is made when it is asked for.

    `read` gives the array, of this dtype (bfloat16 and the like: ml_dtypes') and shape; it may be a view.
    """

    dtype: np.dtype
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """As a file stores it: two 4-bit numbers take a byte."""
        count = int(np.prod(self.shape, dtype=np.int64))
        return -(-count // 2) if self.dtype.name in FOUR_BITS else count * self.dtype.itemsize


@dataclass(frozen=True)
class Graph:
    """An ONNX graph whose weights are not in the proto (see the top of this file).

    Weights made from a torch model refer to it: as long as the graph lives so does the model, and what changes there
    changes here.
    """

    proto: onnx.ModelProto
    weights: Mapping[str, Weight] = field(default_factory=dict)


def stub(name: str, weight: Weight) -> TensorProto:
    """The initializer that stands for `weight` in a proto."""
    data_type = helper.np_dtype_to_tensor_dtype(weight.dtype)
    return TensorProto(name=name, data_type=data_type, dims=weight.shape, data_location=TensorProto.EXTERNAL)


def weight_of(graph: Graph, name: str) -> Weight:
    """Any initializer of the graph, one that is in the proto too. Raises KeyError where it has none of that name."""
    if name in graph.weights:
        return graph.weights[name]
    tensor = next((tensor for tensor in graph.proto.graph.initializer if tensor.name == name), None)
    if tensor is None:
        raise KeyError(name)
    dtype = np.dtype(helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return Weight(dtype, tuple(tensor.dims), partial(numpy_helper.to_array, tensor))


def load_all(graph: Graph) -> onnx.ModelProto:
    """A proto with every weight in it: for small graphs and for tests."""
    proto = _copied(graph.proto)
    for tensor in proto.graph.initializer:
        if tensor.name in graph.weights:
            _fill_(tensor, graph.weights[tensor.name])
    return proto


def save_graph(graph: Graph, path: Path, *, data: str | None = None) -> int:
    """Check the graph and write it to `path`, reading one weight at a time; returns the bytes written.

    Weights go into the same file; into `data`, relative to the folder of `path` ('unet/model.onnx_data'), where it is
    given; and into `path`.data where one protobuf file cannot hold them. The same graph gives the same bytes. Raises
    onnx.checker.ValidationError for a graph that is none.
    """
    _check(graph)
    if data is None and _inline_bytes(graph) <= MAX_INLINE_BYTES:
        with path.open("wb") as file:
            _write_inline(graph, file)
        return path.stat().st_size
    data = data or f"{path.name}.data"
    _write_external(graph, path, data)
    return path.stat().st_size + (path.parent / data).stat().st_size


def write_view(path: Path, view: Path) -> None:
    """Write the graph of `path` to `view` as well, a second small file over the same data file.

    The data must lie in the folder of `view` or below it, for ONNX refuses references upwards (ValueError).
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


def _check(graph: Graph) -> None:
    """The checker looks at structure only, so the weights are shown to it as inputs of their dtypes and shapes."""
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
    """The message that `load_all(graph)` is, except that its weights come after the other initializers."""
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
    """What stands before the bytes of a field: its number and their length, as varints (7 bits a byte, low first)."""
    out = bytearray()
    for value in (number << 3 | LENGTH_DELIMITED, length):
        while value > 0x7F:
            out.append(value & 0x7F | 0x80)
            value >>= 7
        out.append(value)
    return bytes(out)


def _write_external(graph: Graph, path: Path, data: str) -> None:
    proto = _copied(graph.proto)
    (path.parent / data).parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / data).open("wb") as file:
        for tensor in proto.graph.initializer:
            weight = weight_of(graph, tensor.name)
            if weight.nbytes <= SMALL_BYTES:
                _fill_(tensor, weight)
                continue
            tensor.CopyFrom(stub(tensor.name, weight))
            file.write(bytes(-file.tell() % PAGE))
            for key, value in (("location", data), ("offset", file.tell()), ("length", weight.nbytes)):
                tensor.external_data.add(key=key, value=str(value))
            file.write(_bytes(tensor.name, weight))
    path.write_bytes(proto.SerializeToString(deterministic=True))


def _fill_(tensor: TensorProto, weight: Weight) -> None:
    tensor.CopyFrom(numpy_helper.from_array(_array(tensor.name, weight), tensor.name))


def _bytes(name: str, weight: Weight) -> memoryview:
    # viewed as bytes, for ml_dtypes' arrays have no buffer; a transposed array is copied here
    stored = np.ascontiguousarray(_array(name, weight)).reshape(-1).view(np.uint8)
    return (_packed(stored) if weight.dtype.name in FOUR_BITS else stored).data


def _packed(numbers: np.ndarray) -> np.ndarray:
    """uint8 [N], of which the lower 4 bits count -> uint8 [ceil(N / 2)], the first of two in the lower half."""
    pairs = np.pad(numbers, (0, numbers.size % 2)).reshape(-1, 2) & 0x0F
    return pairs[:, 0] | pairs[:, 1] << 4


def _array(name: str, weight: Weight) -> np.ndarray:
    array = weight.read()
    if array.dtype != weight.dtype or array.shape != weight.shape:
        raise ValueError(
            f"weight '{name}' is {array.dtype} {array.shape} now, {weight.dtype} {weight.shape} when it was traced; "
            "export again after changing the model"
        )
    return array
