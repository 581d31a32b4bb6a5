"""Float32 graph -> the same graph in half precision, with fp32 fallback (passes/fp32_fallback.py).

    sample f32 -> Cast -> layers, activations: float16 or bfloat16 -> Cast -> norm, softmax: float32 -> Cast -> ...

Inputs and outputs keep their names and types, nodes their names and order. Every float tensor is computed in one of the
two types, and a Cast, one per tensor, converts it for readers of the other. Weights are rounded when they are written,
one at a time: to nearest, ties to even. float16 ends at 65504, and below 6.1e-5 it loses a bit with every halving;
bfloat16 has the range of float32 and 8 significant bits, where float16 has 11.

onnxruntime.transformers.float16 does not support bfloat16, needs all weights in one proto below 2 GiB, and silently
clips overflows. modelopt's AutoCast requires an older ONNX and onnx-graphsurgeon, and also loads all weights.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from functools import partial

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper, shape_inference

from diffpress.export.graph.model import Graph, Weight, weight_of
from diffpress.export.graph.opsets import opset_of, with_min_opset
from diffpress.export.graph.rewrite import Rewrite, copies
from diffpress.export.passes.fp32_fallback import ROUNDING, fp32_nodes
from diffpress.runtime.errors import InvalidInputError, unknown_name

FLOAT = "fp32"
HALVES = {"fp16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}

# first opsets with bfloat16 convolutions and with float16 scales of DequantizeLinear
BF16_OPSET, SCALE_OPSET = 22, 19

FLOAT32 = np.dtype(np.float32)

# operator -> inputs that are always float32
ALWAYS_FLOAT = {"Resize": (2,)}


@dataclass(frozen=True)
class PrecisionLoss:
    """Precision lost by `total` numbers in half precision: how many became 0 or subnormal."""

    zero: int = 0
    subnormal: int = 0
    total: int = 0

    def __str__(self) -> str:
        return f"of {self.total:,} weights {self.zero:,} became 0 and {self.subnormal:,} became subnormal"

    def __add__(self, other: PrecisionLoss) -> PrecisionLoss:
        return PrecisionLoss(self.zero + other.zero, self.subnormal + other.subnormal, self.total + other.total)


def kept_modules(module: object, precision: str) -> tuple[str, ...]:
    """Return the modules that overflow float16 according to transformers and diffusers, e.g. 'wo' of T5."""
    return tuple(getattr(module, "_keep_in_fp32_modules", None) or ()) if precision == "fp16" else ()


def to_half(graph: Graph, precision: str, keep: Collection[str] = ()) -> tuple[Graph, PrecisionLoss]:
    """Return a copy of `graph` in 'fp16' or 'bf16', and the precision lost by its weights.

    Layers in modules `keep` stay float32. Reads every weight once.

    Raises:
        InvalidInputError: If a weight overflows (the message names it), or if the graph has branches or operators whose
            output types ONNX cannot infer.
    """
    if precision not in HALVES:
        raise unknown_name("half precision", precision, HALVES)
    graph = with_min_opset(graph, _needed_opset(graph, precision))
    floats = _floats(graph)
    inside = fp32_nodes(graph.proto.graph, floats, _lacking(graph, HALVES[precision]), keep)
    halving = _Halving(graph, HALVES[precision], floats)
    for index, node in enumerate(copies(graph.proto.graph.node)):
        halving.add_(node, FLOAT32 if index in inside else HALVES[precision])
    return halving.rewrite.graph(), halving.lost


def _needed_opset(graph: Graph, precision: str) -> int:
    if precision == "bf16":
        return BF16_OPSET
    return SCALE_OPSET if any(node.op_type in ROUNDING for node in graph.proto.graph.node) else 0


def _floats(graph: Graph) -> set[str]:
    """Return the names of all float32 tensors."""
    proto = onnx.ModelProto()
    proto.CopyFrom(graph.proto)
    inner = proto.graph
    del inner.initializer[:]
    for tensor in graph.proto.graph.initializer:  # a weight has no bytes here; only its type is needed
        if tensor.name in graph.weights:
            inner.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
        else:
            inner.initializer.append(tensor)
    inner = shape_inference.infer_shapes(proto).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*inner.input, *inner.output, *inner.value_info)}
    types |= {tensor.name: tensor.data_type for tensor in inner.initializer}
    for node in inner.node:
        unknown = [name for name in node.output if name and not types.get(name)]
        if unknown or any(attribute.HasField("g") for attribute in node.attribute):
            raise InvalidInputError(
                f"node '{node.name}': {node.op_type} cannot be converted to half precision; export in fp32"
            )
    return {name for name, kind in types.items() if kind == TensorProto.FLOAT}


def _lacking(graph: Graph, half: np.dtype) -> set[str]:
    """Return the graph's operators that ONNX does not define for this type."""
    version, half_type = opset_of(graph), f"tensor({half.name})"
    found = set()
    for kind, domain in {(node.op_type, node.domain) for node in graph.proto.graph.node}:
        allowed = [entry.allowed_type_strs for entry in onnx.defs.get_schema(kind, version, domain).type_constraints]
        if any("tensor(float)" in types and half_type not in types for types in allowed):
            found.add(kind)
    return found


@dataclass
class _Halving:
    """Graph under construction; `made` maps each float tensor to the type it is computed in."""

    source: Graph
    half: np.dtype
    floats: set[str]
    lost: PrecisionLoss = PrecisionLoss()
    made: dict[str, np.dtype] = field(default_factory=dict)
    versions: dict[tuple[str, np.dtype], str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        graph = self.source.proto.graph
        self.rewrite = Rewrite(self.source)
        self.stored = {tensor.name for tensor in graph.initializer}
        self.outputs = {value.name for value in graph.output}
        for value in graph.input:
            self._make_(value.name, FLOAT32, value.name)

    def add_(self, node: onnx.NodeProto, dtype: np.dtype) -> None:
        """Add the node so that it reads and writes `dtype` instead of float32."""
        # a Cast reads any type
        for index, name in enumerate(node.input if node.op_type != "Cast" else []):
            if name in self.floats:
                node.input[index] = self._version(name, self._input_type(node, index, dtype))
        if node.op_type == "Cast":
            node.input[0] = self.versions.get((node.input[0], self.made.get(node.input[0], FLOAT32)), node.input[0])
        self._retype_(node, dtype)
        self.rewrite.nodes.append(node)
        for index, name in enumerate(node.output):
            if name in self.floats:
                renamed = name in self.outputs and dtype != FLOAT32
                node.output[index] = self._make_(name, dtype, f"{name}.{dtype.name}" if renamed else name)
                if renamed:
                    self._cast(name, FLOAT32, name)

    def _input_type(self, node: onnx.NodeProto, index: int, dtype: np.dtype) -> np.dtype:
        return FLOAT32 if index in ALWAYS_FLOAT.get(node.op_type, ()) else dtype

    def _retype_(self, node: onnx.NodeProto, dtype: np.dtype) -> None:
        """Change the attributes that define the output type."""
        if node.output[0] not in self.floats:
            return
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.name == "to":
                attribute.i = helper.np_dtype_to_tensor_dtype(dtype)
            elif attribute.type == onnx.AttributeProto.TENSOR:
                attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(dtype)))

    def _make_(self, tensor: str, dtype: np.dtype, name: str) -> str:
        self.made[tensor] = dtype
        self.versions[tensor, dtype] = name
        return name

    def _version(self, tensor: str, dtype: np.dtype) -> str:
        """Return the name of the tensor in `dtype`, adding a Cast or a stored copy if it does not exist yet."""
        if (tensor, dtype) not in self.versions:
            if tensor in self.stored:
                self.versions[tensor, dtype] = self._store(tensor, dtype)
            else:
                self._cast(tensor, dtype, f"{tensor}.{dtype.name}")
        return self.versions[tensor, dtype]

    def _cast(self, tensor: str, dtype: np.dtype, name: str) -> None:
        made = self.versions[tensor, self.made[tensor]]
        to = helper.np_dtype_to_tensor_dtype(dtype)
        self.rewrite.nodes.append(helper.make_node("Cast", [made], [name], f"{name}/Cast", to=to))
        self.versions[tensor, dtype] = name

    def _store(self, tensor: str, dtype: np.dtype) -> str:
        if dtype == FLOAT32:
            return tensor
        weight, name = weight_of(self.source, tensor), f"{tensor}.{dtype.name}"
        self.lost += _lost(tensor, weight.read(), dtype)
        read = partial(_rounded, weight, dtype)
        if tensor in self.source.weights:
            return self.rewrite.add_weight(name, Weight(dtype, weight.shape, read))
        return self.rewrite.add(name, read())


def _rounded(weight: Weight, dtype: np.dtype) -> np.ndarray:
    return weight.read().astype(dtype)


def _lost(name: str, exact: np.ndarray, dtype: np.dtype) -> PrecisionLoss:
    limits = ml_dtypes.finfo(dtype)
    size = np.abs(exact)
    overflow = np.isfinite(size) & (size > float(limits.max))
    if overflow.any():
        raise InvalidInputError(
            f"weight '{name}': {float(size[overflow].max()):g} exceeds the {dtype.name} maximum of "
            f"{float(limits.max):g}; use --precision {'bf16' if dtype == np.float16 else FLOAT}"
        )
    zero = int(((size > 0) & (size <= float(limits.smallest_subnormal) / 2)).sum())
    small = int(((size > 0) & (size < float(limits.smallest_normal))).sum())
    return PrecisionLoss(zero, small - zero, exact.size)
