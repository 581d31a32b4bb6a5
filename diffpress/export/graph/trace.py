"""Torch module -> float32 ONNX graph whose weights read the module's tensors without a copy.

    module --deepcopy--> the same module with fake tensors (shapes without bytes, float32 for bf16 and fp16)
           --torch.export, ONNX translation--> graph whose layer weights have no values, so nothing folds them
           --optimize, name layers, strip--> Graph with weights: name -> the real tensor, cast to float32 when written

The exporter places a Transpose on a linear layer's weight and would fold it into a second copy of the weight; here the
Transpose moves into `Weight.read`. The graph depends on the network alone: it contains no traces, paths or times.

Quantization finds layers by node name. A node that applies a layer's weight is named after that layer
('mid_block.resnets.0.conv1'; '#2' and so on for repeated uses), and the final sum of a module is named after the module
('mid_block.resnets.0').
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir
import torch
from onnxscript import opset18 as op
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from diffpress.compress.models.fast_path import without_fast_path
from diffpress.export.graph.model import Graph, Weight, stub
from diffpress.runtime.errors import InvalidInputError

# Opset 18 decomposes GroupNorm into Reshape and InstanceNormalization, which gave the fastest int8 graph in OpenVINO:
# 45 ms, 56 ms with opset 21's GroupNormalization, 58 ms with opset 23. In fp32 the difference is negligible.
OPSET = 18

# operator -> index of the input that is the layer's weight
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}

# last node of a residual block: the sum, or its division by a constant
SUMS = ("Add", "Div")

# The optimizer sees tensors up to this size as constants (biases, norms), but never a layer's weight.
FOLDED_BYTES = 2**16

# how torch.export reports a dynamic size that the module does not accept
FIXED_SIZE = re.compile(r"static shape of (\d+) for dimension inputs\['tensors'\]\[(\d+)\]\.shape\[(\d+)\]")

# name prefix of the wrapped module
PREFIX = "model."
SCOPES = "pkg.torch.onnx.name_scopes"

Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor | tuple[Tensor, ...]]


class _PositionalWrapper(nn.Module):
    """Wrap `forward(model, {name: tensor})` as a module that takes positional tensors."""

    def __init__(self, model: nn.Module, forward: Forward, names: list[str]) -> None:
        super().__init__()
        self.model, self._forward, self._names = model, forward, names

    def forward(self, *tensors: Tensor) -> Tensor | tuple[Tensor, ...]:
        return self._forward(self.model, dict(zip(self._names, tensors, strict=True)))


def trace(
    module: nn.Module,
    forward: Forward,
    inputs: dict[str, Tensor],
    outputs: list[str],
    axes: dict[str, dict[int, str]],
) -> Graph:
    """Trace `forward(module, inputs)` in evaluation mode into an ONNX graph.

    Args:
        module: The module, of any dtype and on any device; it is not modified.
        forward: Called with a copy of the module and the inputs by name.
        inputs: Example inputs; floating-point ones become float32.
        outputs: Names of the outputs.
        axes: Names of the inputs' dynamic dimensions, {'sample': {0: 'batch'}}. The example must have a
            size of at least 2 there, because torch specializes the graph to a size of 1.

    Raises:
        InvalidInputError: If the module cannot be traced.
    """
    try:
        with _quiet(), without_fast_path():
            program = _exported(_PositionalWrapper(_faked(module), forward, list(inputs)).eval(), inputs, outputs, axes)
            tensors = {f"{PREFIX}{name}": tensor for name, tensor in _tensors(module)}
            weights = _take_weights_(program.model.graph, tensors)
            with _hidden_scalars(program.model.graph):
                program.optimize()
    except Exception as error:  # tracing, decomposition and translation each raise their own types
        reason = _reason(error, {name: axes.get(name, {}) for name in inputs})
        raise InvalidInputError(f"{type(module).__name__}: cannot be traced into an ONNX graph ({reason})") from error
    graph = _assembled(program.model, weights)
    _name_layers_(graph.proto.graph, module)
    _name_sums_(graph.proto.graph, module)
    _name_axes_(graph.proto.graph, axes)
    _strip_(graph.proto)
    return graph


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters(remove_duplicate=False)
    yield from module.named_buffers(remove_duplicate=False)


def _faked(module: nn.Module) -> nn.Module:
    """Return a copy of `module` on the CPU whose parameters and buffers have shapes but no bytes."""
    memo: dict[int, object] = {}  # deepcopy takes these for copied already; tied weights stay tied
    with FakeTensorMode():
        for _, tensor in _tensors(module):
            fake = torch.empty(tensor.shape, dtype=_widened(tensor.dtype), device="cpu")
            memo[id(tensor)] = nn.Parameter(fake, requires_grad=False) if isinstance(tensor, nn.Parameter) else fake
    return copy.deepcopy(module, memo)


def _widened(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.is_floating_point and dtype.itemsize < 4 else dtype


def _exported(
    module: nn.Module, inputs: dict[str, Tensor], outputs: list[str], axes: dict[str, dict[int, str]]
) -> torch.onnx.ONNXProgram:
    # not a named Dim: diffusers has a harmless branch at batch size 64, for which it would be traced twice
    dynamic = tuple(dict.fromkeys(axes.get(name, {}), torch.export.Dim.DYNAMIC) for name in inputs)
    program = torch.onnx.export(
        module,
        tuple(value.to("cpu", _widened(value.dtype)) for value in inputs.values()),
        dynamo=True,
        opset_version=OPSET,
        input_names=list(inputs),
        output_names=outputs,
        dynamic_shapes={"tensors": dynamic},
        optimize=False,
        verbose=False,
        custom_translation_table={torch.ops.aten.squeeze.dim: _squeezed},
    )
    assert program is not None  # None only if a file was requested
    return program


def _squeezed(tensor: Any, dim: int) -> Any:
    """Squeeze as torch does: an axis longer than 1 stays (PixArt's last `squeeze`); ONNX rejects it."""
    shape = tensor.shape or ()
    if not shape or (isinstance(shape[dim], int) and shape[dim] != 1):
        return op.Identity(tensor)
    axes: Any = op.Constant(value_ints=[dim])
    return op.Squeeze(tensor, axes)


def _take_weights_(graph: onnx_ir.Graph, tensors: dict[str, Tensor]) -> dict[onnx_ir.Value, Weight]:
    """Give small fake tensors their real values, strip the others of values, and return those as weights."""
    weights = {}
    for name, value in graph.initializers.items():
        if not isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            continue  # a constant created in forward
        tensor = tensors[name]
        dtype, identity = _widened(tensor.dtype), tuple(range(tensor.dim()))
        is_layer_weight = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        if not is_layer_weight and tensor.numel() * dtype.itemsize <= FOLDED_BYTES:
            value.const_value = onnx_ir.tensor(_read(tensor, identity).copy(), name=name)
        else:
            value.const_value = None
            order = _move_transposes_(graph, value) or identity
            assert value.dtype is not None
            shape = tuple(tensor.shape[i] for i in order)
            weights[value] = Weight(value.dtype.numpy(), shape, partial(_read, tensor, order))
    return weights


@contextlib.contextmanager
def _hidden_scalars(graph: onnx_ir.Graph) -> Iterator[None]:
    """Hide scalars that the optimizer takes for 0 or 1: it would remove `+ 1e-8` and `* 1.000001`."""
    hidden: dict[onnx_ir.Value, onnx_ir.TensorProtocol] = {}
    scalars = {value: value.const_value for value in graph.initializers.values()}
    scalars |= {node.outputs[0]: onnx_ir.convenience.get_const_tensor(node.outputs[0]) for node in graph}
    for value, tensor in scalars.items():
        if tensor is None or isinstance(getattr(tensor, "raw", None), FakeTensor) or tensor.shape != ():
            continue
        number = tensor.numpy().item()
        if any(number != whole and math.isclose(number, whole, rel_tol=1e-5, abs_tol=1e-8) for whole in (0, 1)):
            stored = value
            if value.producer() is not None:
                name = f"{value.name}_scalar"
                stored = onnx_ir.Value(name=name, type=value.type, shape=value.shape, const_value=tensor)
                value.replace_all_uses_with(stored)
                graph.register_initializer(stored)
            stored.const_value = None
            hidden[stored] = tensor
    yield
    for value, tensor in hidden.items():
        value.const_value = tensor


def _read(tensor: Tensor, order: tuple[int, ...]) -> np.ndarray:
    array: np.ndarray = tensor.detach().to("cpu", _widened(tensor.dtype)).numpy()
    return array.transpose(order)


def _move_transposes_(graph: onnx_ir.Graph, value: onnx_ir.Value) -> tuple[int, ...] | None:
    """Remove the Transpose that all readers of a weight share; return its permutation, None otherwise."""
    readers = [node for node, _ in value.uses()]
    orders = {_permutation(node) for node in readers}
    if len(orders) != 1 or None in orders:
        return None
    for node in readers:
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)
    order = orders.pop()
    assert order is not None and value.shape is not None
    value.shape = onnx_ir.Shape([value.shape[i] for i in order])
    return order


def _permutation(node: onnx_ir.Node) -> tuple[int, ...] | None:
    """Return the permutation of a Transpose written by the exporter, or None for any other node."""
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output() or "perm" not in node.attributes:
        return None
    return tuple(node.attributes["perm"].as_ints())


def _assembled(model: onnx_ir.Model, weights: dict[onnx_ir.Value, Weight]) -> Graph:
    """Convert to a proto with stubs for the weights and without the wrapper's name prefix."""
    used = {}
    for value, weight in weights.items():
        if value.name is not None and model.graph.initializers.pop(value.name, None) is not None:
            used[value.name] = weight
    proto = onnx_ir.to_proto(model)
    proto.graph.initializer.extend(stub(name, weight) for name, weight in used.items())
    for tensor in proto.graph.initializer:
        tensor.name = tensor.name.removeprefix(PREFIX)
    for node in proto.graph.node:
        node.input[:] = [name.removeprefix(PREFIX) for name in node.input]
    return Graph(proto, {name.removeprefix(PREFIX): weight for name, weight in used.items()})


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Suppress prints, warnings and log messages of the exporter; errors are raised as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        void = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(void), contextlib.redirect_stderr(void):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException, axes: dict[str, dict[int, str]]) -> str:
    """Return the root cause and what to do, in one line; the exporter wraps it in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    fixed = FIXED_SIZE.findall(str(error))
    if fixed:
        places = []
        for number, dim, size in ((int(index), int(dim), size) for size, index, dim in fixed):
            name = list(axes)[number]
            places.append(f"axis {dim} of input '{name}' ({axes[name].get(dim, '')}) to {size}")
        return (
            f"its forward fixes {' and '.join(places)}, the size that it was traced with; it must accept any number of "
            "samples, each with its own timestep"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    reason = f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
    if "No ONNX function found" in reason:
        return f"{reason}; replace this operator in its forward"
    return f"{reason}; its forward must consist of tensor operations without branches on tensor values"


def _name_layers_(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Name the nodes that apply a layer's weight after that layer."""
    layers = {
        name: canonical for name, canonical in _names(module).items() if hasattr(module.get_submodule(name), "weight")
    }
    stored = {tensor.name for tensor in graph.initializer}
    uses: dict[str, int] = {}
    for node in graph.node:
        layer, index = layers.get(_layer(node), ""), WEIGHT_INPUT.get(node.op_type)
        if index is not None and layer and node.input[index] in stored:
            uses[layer] = uses.get(layer, 0) + 1
            node.name = layer if uses[layer] == 1 else f"{layer}#{uses[layer]}"


def _names(module: nn.Module) -> dict[str, str]:
    """Return the name of every submodule -> its first name; one that is registered twice has two."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(child), name) for name, child in module.named_modules(remove_duplicate=False)}


def _name_sums_(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Name the final sum of a module that has no weight after the module.

    It is computed in the module and read outside of it. If there are two, as in a module called twice, none is named.
    """
    modules = {name for name, child in module.named_modules() if name and not hasattr(child, "weight")}
    readers: dict[str, list[str]] = {value.name: [""] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(_layer(node))
    sums: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        name = _layer(node)
        outside = any(not f"{reader}.".startswith(f"{name}.") for reader in readers[node.output[0]])
        if name in modules and node.op_type in SUMS and outside:
            sums.setdefault(name, []).append(node)
    for name, found in sums.items():
        if len(found) == 1:
            found[0].name = name


def _layer(node: onnx.NodeProto) -> str:
    """Return the name of the innermost module in which the exporter created this node."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    modules = ast.literal_eval(scopes)[:-1]  # the last scope is the operation itself
    return str(modules[-1]).removeprefix(PREFIX) if modules else ""


def _name_axes_(graph: onnx.GraphProto, axes: dict[str, dict[int, str]]) -> None:
    """Name the inputs' dynamic dimensions as in `axes`, and the outputs' by formula ('8 * height')."""
    names: dict[str, str] = {}
    for value in graph.input:
        for dim, name in axes.get(value.name, {}).items():
            size = value.type.tensor_type.shape.dim[dim]
            names.setdefault(size.dim_param, name)
            size.dim_param = name
    for value in graph.output:
        for size in value.type.tensor_type.shape.dim:
            if size.dim_param:
                named = re.sub(r"\w+", lambda symbol: names.get(symbol[0], symbol[0]), size.dim_param)
                # optimum evaluates these and expects names, numbers and operators separated by spaces
                size.dim_param = " ".join(re.findall(r"\w+|//|[^\w\s]", named))


def _strip_(model: onnx.ModelProto) -> None:
    """Remove what engines do not read: stack traces, scopes, doc strings, inferred shapes."""
    graph = model.graph
    del graph.value_info[:]
    for message in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        message.ClearField("doc_string")
        del message.metadata_props[:]
