"""Checkpoint -> float ONNX graph, the portable truth that everything else is made from.

    sample [B, C, H, W] f32, timestep [B] i64 (f32 for flow), class_labels [B] i64   ->   out_sample [B, C, H, W] f32

B is dynamic. The file depends on the network alone: no traces, paths or times. A node that applies a layer's weight is
named after that layer ('mid_block.resnets.0.conv1'; '#2' and so on where it is called again), and this is how
quantization finds it: initializers cannot tell, for the exporter merges equal ones and renames those it transposes.
"""

from __future__ import annotations

import ast
import contextlib
import io
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path

import onnx
import torch
from torch import nn

from compress.adapters import adapter_for, example_inputs
from compress.checkpoint import Checkpoint
from runtime.denoise import LABELS, SAMPLE, TIMESTEP
from runtime.errors import BadInput

# Opset 18 writes GroupNorm as reshape + InstanceNormalization, which gave the fastest int8 graph in OpenVINO: 45 ms
# against 56 with opset 21's GroupNormalization and 58 with opset 23; in fp32 they hardly differ.
OPSET = 18
OUT = "out_sample"

# torch.export would fix a batch of one in the graph
TRACED_BATCH = 2

# protobuf cannot hold a message of 2 GiB; the graph itself needs some of it
MAX_INLINE_BYTES = 2**31 - 2**24

# operator -> which of its inputs is the layer's weight
WEIGHT_INPUT = {"Conv": 1, "ConvTranspose": 1, "Gemm": 1, "MatMul": 1, "Gather": 0}

SCOPES = "pkg.torch.onnx.name_scopes"


class _Named(nn.Module):
    """The model called through its adapter, with the graph's input names as arguments."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self._forward = model, adapter_for(model).forward

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        inputs = {SAMPLE: sample, TIMESTEP: timestep}
        return self._forward(self.model, inputs if class_labels is None else {**inputs, LABELS: class_labels})


def export_float(checkpoint: Checkpoint, path: Path) -> onnx.ModelProto:
    """Write the checkpoint's network in float32 to `path` (and `path`.data above 2 GiB); returns the graph.

    The same checkpoint gives the same bytes in any process. Raises BadInput where the module cannot be traced.
    """
    model = to_onnx(checkpoint)
    save_onnx(model, path)
    return model


def to_onnx(checkpoint: Checkpoint) -> onnx.ModelProto:
    """The checkpoint's network as an ONNX graph in memory (see the top of this file)."""
    model, training = checkpoint.model, checkpoint.model.training
    model.eval()
    try:
        with _quiet():
            proto = _traced(checkpoint)
    except Exception as error:  # tracing, decomposing and translating each raise types of their own
        kind = type(model).__name__
        raise BadInput(
            f"{kind}: cannot be traced into an ONNX graph ({_reason(error)}); its forward must be made of tensor "
            "operations, without branches on tensor values"
        ) from error
    finally:
        model.train(training)
    _name_layers_(proto.graph, model)
    _strip_(proto)
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.shape.dim[0].dim_param = "batch"
    return proto


def save_onnx(model: onnx.ModelProto, path: Path) -> None:
    """Write a graph and check it; weights beyond what one protobuf file can hold go to `path`.data."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > MAX_INLINE_BYTES:
        onnx.save_model(model, path, save_as_external_data=True, location=f"{path.name}.data")
        onnx.load_external_data_for_model(model, str(path.parent))  # saving left references in place of the weights
    else:
        path.write_bytes(model.SerializeToString(deterministic=True))
    onnx.checker.check_model(str(path))


def _traced(checkpoint: Checkpoint) -> onnx.ModelProto:
    device = next((parameter.device for parameter in checkpoint.model.parameters()), torch.device("cpu"))
    inputs = {name: value.to(device) for name, value in example_inputs(checkpoint.spec, TRACED_BATCH).items()}
    # not a named Dim: diffusers takes a harmless branch at a batch of 64, for which that is traced a second time
    program = torch.onnx.export(
        _Named(checkpoint.model).eval(),
        kwargs=inputs,
        dynamo=True,
        opset_version=OPSET,
        output_names=[OUT],
        dynamic_shapes={name: {0: torch.export.Dim.DYNAMIC} for name in inputs},
        verbose=False,
    )
    assert program is not None  # None only where a file was asked for
    return program.model_proto


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


def _name_layers_(graph: onnx.GraphProto, model: nn.Module) -> None:
    """Drop the wrapper's prefix, and name nodes and folded weights after the layers they belong to."""
    layers = {name for name, module in model.named_modules() if hasattr(module, "weight")}
    renamed = {tensor.name: tensor.name.removeprefix("model.") for tensor in graph.initializer}
    calls: dict[str, int] = {}
    for node in graph.node:
        layer, index = _layer(node), WEIGHT_INPUT.get(node.op_type)
        if index is None or layer not in layers or node.input[index] not in renamed:
            continue
        calls[layer] = calls.get(layer, 0) + 1
        node.name = layer if calls[layer] == 1 else f"{layer}#{calls[layer]}"
        folded, name = node.input[index] == renamed[node.input[index]], f"{layer}.weight"
        if folded and name not in renamed.values():
            renamed[node.input[index]] = name
    for tensor in graph.initializer:
        tensor.name = renamed[tensor.name]
    for node in graph.node:
        node.input[:] = [renamed.get(name, name) for name in node.input]


def _layer(node: onnx.NodeProto) -> str:
    """The innermost module the exporter was in when it made this node."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    modules = ast.literal_eval(scopes)[:-1]  # the last scope is the operation's own
    return str(modules[-1]).removeprefix("model.") if modules else ""


def _strip_(model: onnx.ModelProto) -> None:
    """Remove what an engine does not read: stack traces, scopes, doc strings, inferred shapes."""
    graph = model.graph
    del graph.value_info[:]
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        part.ClearField("doc_string")
        del part.metadata_props[:]
