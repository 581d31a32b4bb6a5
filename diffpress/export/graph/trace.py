"""Torch module -> float32 ONNX graph, of which no weight is copied: the graph's weights read the module's tensors.

    module --deepcopy--> the same module over fake tensors (shapes without bytes, float32 for bf16 and fp16)
           --torch.export, ONNX translation--> graph, in which layers' weights have no values and nothing folds them
           --optimize, name layers, strip--> Graph, its weights: name -> the real module's tensor, widened when written

The exporter puts a linear layer's weight behind a Transpose, and would fold it into a second copy of the weight: here
the Transpose moves into `Weight.read`. The graph depends on the network alone: no traces, paths or times. A node that
applies a layer's weight is named after that layer ('mid_block.resnets.0.conv1'; '#2' and so on where it is called
again), and the sum in which a module ends after the module ('mid_block.resnets.0'): this is how quantization finds
them.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import io
import logging
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

from diffpress.export.graph.model import Graph, Weight, stub
from diffpress.runtime.errors import InvalidInputError

# Opset 18 writes GroupNorm as reshape + InstanceNormalization, which gave the fastest int8 graph in OpenVINO: 45 ms
# against 56 with opset 21's GroupNormalization and 58 with opset 23; in fp32 they hardly differ.
OPSET = 18

# operator -> which of its inputs is the layer's weight
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}

# what a residual block ends in: the sum, or the division of it by a constant
SUMS = ("Add", "Div")

# What is larger is no constant to the optimizer, nor is a layer's weight of any size; biases and norms are folded.
FOLDED_BYTES = 2**16

# of the module inside the one that is exported
PREFIX = "model."
SCOPES = "pkg.torch.onnx.name_scopes"

Forward = Callable[[nn.Module, dict[str, Tensor]], Tensor | tuple[Tensor, ...]]


class _Called(nn.Module):
    """`forward(model, {name: tensor})` as a module of positional tensors."""

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
    """The graph of `forward(module, inputs)`, its outputs named `outputs`, in evaluation mode.

    `inputs` are examples (float ones become float32); `axes` names what is dynamic in them, {'sample': {0: 'batch'}}. A
    dynamic dimension needs an example of at least 2: torch would fix a 1 in the graph. The module is left as it is, and
    may be of any dtype and on any device. Raises InvalidInputError where it cannot be traced.
    """
    try:
        with _quiet():
            program = _exported(_Called(_faked(module), forward, list(inputs)).eval(), inputs, outputs, axes)
            tensors = {f"{PREFIX}{name}": tensor for name, tensor in _tensors(module)}
            weights = _take_weights_(program.model.graph, tensors)
            program.optimize()
    except Exception as error:  # tracing, decomposing and translating each raise types of their own
        kind = type(module).__name__
        raise InvalidInputError(
            f"{kind}: cannot be traced into an ONNX graph ({_reason(error)}); its forward must be made of tensor "
            "operations, without branches on tensor values"
        ) from error
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
    """A copy of `module` on the CPU whose parameters and buffers have shapes and no bytes."""
    memo: dict[int, object] = {}  # what deepcopy has copied already, as far as it knows; tied weights stay tied
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
    # not a named Dim: diffusers takes a harmless branch at a batch of 64, for which that is traced a second time
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
    assert program is not None  # None only where a file was asked for
    return program


def _squeezed(tensor: Any, dim: int) -> Any:
    """Torch leaves an axis alone that is longer than 1 (PixArt's last `squeeze`); ONNX's Squeeze refuses it."""
    shape = tensor.shape or ()
    if not shape or (isinstance(shape[dim], int) and shape[dim] != 1):
        return op.Identity(tensor)
    axes: Any = op.Constant(value_ints=[dim])
    return op.Squeeze(tensor, axes)


def _take_weights_(graph: onnx_ir.Graph, tensors: dict[str, Tensor]) -> dict[onnx_ir.Value, Weight]:
    """Give the small fakes their real values and the rest none at all; returns what the rest are."""
    weights = {}
    for name, value in graph.initializers.items():
        if not isinstance(getattr(value.const_value, "raw", None), FakeTensor):
            continue  # a constant of the forward's own
        tensor = tensors[name]
        dtype, as_it_is = _widened(tensor.dtype), tuple(range(tensor.dim()))
        layers = isinstance(tensor, nn.Parameter) and tensor.dim() > 1
        if not layers and tensor.numel() * dtype.itemsize <= FOLDED_BYTES:
            value.const_value = onnx_ir.tensor(_read(tensor, as_it_is).copy(), name=name)
        else:
            value.const_value = None
            order = _move_transposes_(graph, value) or as_it_is
            assert value.dtype is not None
            shape = tuple(tensor.shape[i] for i in order)
            weights[value] = Weight(value.dtype.numpy(), shape, partial(_read, tensor, order))
    return weights


def _read(tensor: Tensor, order: tuple[int, ...]) -> np.ndarray:
    array: np.ndarray = tensor.detach().to("cpu", _widened(tensor.dtype)).numpy()
    return array.transpose(order)


def _move_transposes_(graph: onnx_ir.Graph, value: onnx_ir.Value) -> tuple[int, ...] | None:
    """Where every reader transposes the value in one way, remove them and return the permutation it now stands for."""
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
    """The permutation of a Transpose that the exporter wrote, None for any other node."""
    if node.op_type != "Transpose" or node.outputs[0].is_graph_output() or "perm" not in node.attributes:
        return None
    return tuple(node.attributes["perm"].as_ints())


def _assembled(model: onnx_ir.Model, weights: dict[onnx_ir.Value, Weight]) -> Graph:
    """The proto, with the wrapper's prefix taken off the names, and stubs for the weights."""
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
    """Keep the exporter's prints, warnings and log lines to itself: errors come as exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        void = io.StringIO()
        with warnings.catch_warnings(), contextlib.redirect_stdout(void), contextlib.redirect_stderr(void):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _reason(error: BaseException) -> str:
    """One line: the exporter wraps the first cause in a page of advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _name_layers_(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Name the nodes that apply a layer's weight after the layer."""
    layers = {name for name, child in module.named_modules() if hasattr(child, "weight")}
    stored = {tensor.name for tensor in graph.initializer}
    calls: dict[str, int] = {}
    for node in graph.node:
        layer, index = _layer(node), WEIGHT_INPUT.get(node.op_type)
        if index is not None and layer in layers and node.input[index] in stored:
            calls[layer] = calls.get(layer, 0) + 1
            node.name = layer if calls[layer] == 1 else f"{layer}#{calls[layer]}"


def _name_sums_(graph: onnx.GraphProto, module: nn.Module) -> None:
    """Name the sum in which a module without a weight of its own ends after the module.

    It is made in the module itself and read outside; where there are two, as in a module called twice, none is named.
    """
    modules = {name for name, child in module.named_modules() if name and not hasattr(child, "weight")}
    readers: dict[str, list[str]] = {value.name: [""] for value in graph.output}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(_layer(node))
    ends: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        name = _layer(node)
        outside = any(not f"{reader}.".startswith(f"{name}.") for reader in readers[node.output[0]])
        if name in modules and node.op_type in SUMS and outside:
            ends.setdefault(name, []).append(node)
    for name, found in ends.items():
        if len(found) == 1:
            found[0].name = name


def _layer(node: onnx.NodeProto) -> str:
    """The innermost module the exporter was in when it made this node."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    modules = ast.literal_eval(scopes)[:-1]  # the last scope is the operation's own
    return str(modules[-1]).removeprefix(PREFIX) if modules else ""


def _name_axes_(graph: onnx.GraphProto, axes: dict[str, dict[int, str]]) -> None:
    """Name the inputs' dynamic dimensions as `axes` does, and the outputs' by what they follow from ('8 * height')."""
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
                # optimum evaluates these, and takes what stands between spaces for a name, a number or an operator
                size.dim_param = " ".join(re.findall(r"\w+|//|[^\w\s]", named))


def _strip_(model: onnx.ModelProto) -> None:
    """Remove what an engine does not read: stack traces, scopes, doc strings, inferred shapes."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        del part.metadata_props[:]
