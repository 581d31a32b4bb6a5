"""The controlled graph of a U-Net: its graph with residuals of control networks as inputs.

    denoiser.onnx            sample, ...               Concat(hidden, skip_i)
    denoiser.control.onnx    sample, ..., residuals    Concat(hidden, skip_i + down_block_residual_i)

mid_block_residual is added to the first hidden states that are concatenated, which the middle wrote. The graph is made
from the written file and refers to the same data file: the weights are stored once. Sums are computed in floating
point: in a quantized graph they read dequantized tensors, and what follows a concatenation reads its sum before it is
rounded, except for integer layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx
from onnx import TensorProto, helper

from diffpress.export.graph.trace import WEIGHT_INPUT
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.control import DOWN_RESIDUAL, MID_RESIDUAL


def controlled_file(file: str) -> str:
    """Return the name of a graph's controlled graph: 'denoiser.control.onnx'."""
    return f"{file.removesuffix('.onnx')}.control.onnx"


def write_controlled_graph(path: Path, controlled: Path, residuals: Mapping[str, Sequence[int | str]]) -> int:
    """Write the controlled graph of the graph in `path`, in the same folder, and return its bytes.

    `residuals` are the names of the inputs with their dimensions, fixed or by name.
    """
    proto = onnx.load(path, load_external_data=False)
    controlled.write_bytes(controlled_graph(proto, residuals).SerializeToString(deterministic=True))
    return controlled.stat().st_size


def controlled_graph(proto: onnx.ModelProto, residuals: Mapping[str, Sequence[int | str]]) -> onnx.ModelProto:
    """Return the graph with the residuals as inputs, and its first output alone.

    Raises:
        InvalidInputError: The graph has fewer skip connections than residuals.
    """
    result = onnx.ModelProto()
    result.CopyFrom(proto)
    graph = result.graph
    down = [name for name in residuals if name != MID_RESIDUAL]
    # the last ones: others concatenate the inputs
    concats = [node for node in graph.node if _is_skip(node)][-len(down) :]
    if len(concats) < len(down):
        raise InvalidInputError(f"controlnet: the graph has {len(concats)} skip connections for {len(down)} residuals")
    added: dict[str, list[onnx.NodeProto]] = {}
    for index, concat in enumerate(concats):
        name = f"{DOWN_RESIDUAL}{len(down) - 1 - index}"
        added[concat.output[0]] = _added_(concat, 1, name)
        if index == 0:
            added[concat.output[0]] += _added_(concat, 0, MID_RESIDUAL)
        _unround_(graph, concat)
    nodes = [new for node in graph.node for new in (*added.get(node.output[0], ()), node)]
    del graph.node[:], graph.output[1:]
    graph.node.extend(nodes)
    graph.input.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, dims) for name, dims in residuals.items())
    return result


def _is_skip(node: onnx.NodeProto) -> bool:
    """Whether a node concatenates two tensors along their channels."""
    return node.op_type == "Concat" and len(node.input) == 2 and node.attribute[0].i == 1


def _added_(concat: onnx.NodeProto, position: int, residual: str) -> list[onnx.NodeProto]:
    """Make the node read its input plus a residual, in the type of the input; return the new nodes."""
    tensor, typed, total = concat.input[position], f"{residual}/typed", f"{residual}/sum"
    concat.input[position] = total
    return [
        helper.make_node("CastLike", [residual, tensor], [typed], typed),
        helper.make_node("Add", [tensor, typed], [total], total),
    ]


def _unround_(graph: onnx.GraphProto, concat: onnx.NodeProto) -> None:
    """Make readers of a rounded concatenation read it before it is rounded, except for layers with weights.

    The pair of QuantizeLinear and DequantizeLinear changes no value of tensors that are rounded already, but it would
    clip their sums with residuals.
    """
    readers = [node for node in graph.node if concat.output[0] in node.input]
    if [node.op_type for node in readers] != ["QuantizeLinear"]:
        return
    rounded = readers[0].output[0]
    for pair in [node for node in graph.node if rounded in node.input and node.op_type == "DequantizeLinear"]:
        for node in graph.node:
            if node.op_type not in WEIGHT_INPUT:
                for index, name in enumerate(node.input):
                    if name == pair.output[0]:
                        node.input[index] = concat.output[0]
