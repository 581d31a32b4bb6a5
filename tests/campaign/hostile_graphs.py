"""Hostile ONNX graphs for the denoiser of a bundle: each function changes an intact model.

It may return bytes to append to the file.
Files that a graph could leak are called SECRET; the campaign puts one beside the bundle.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SECRET = "secret.bin"
Change = Callable[[onnx.ModelProto, Path], object]


def external(location: str, offset: int | None = None, length: int | None = None) -> Change:
    """Take the first weight from a file."""

    def change(model: onnx.ModelProto, _: Path) -> None:
        tensor = model.graph.initializer[0]
        tensor.ClearField("raw_data")
        tensor.data_location = TensorProto.EXTERNAL
        entries = {"location": location, "offset": offset, "length": length}
        for key, value in entries.items():
            if value is not None:
                tensor.external_data.add(key=key, value=str(value))

    return change


def absolute(model: onnx.ModelProto, folder: Path) -> None:
    external(str(folder.parent / SECRET))(model, folder)


def linked(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "weights.data").symlink_to(folder.parent / SECRET)
    external("weights.data")(model, folder)


def linked_folder(model: onnx.ModelProto, folder: Path) -> None:
    (folder / "weights").symlink_to(folder.parent)
    external(f"weights/{SECRET}")(model, folder)


def hidden_in_a_subgraph(model: onnx.ModelProto, folder: Path) -> None:
    """The outside file is in a constant of a branch of an If."""
    tensor = numpy_helper.from_array(np.zeros(4, np.float32), "value")
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=f"../{SECRET}")
    node = helper.make_node("Constant", [], ["branch"], value=tensor)
    branch = helper.make_graph([node], "g", [], [helper.make_tensor_value_info("branch", TensorProto.FLOAT, [4])])
    condition = helper.make_node("Constant", [], ["condition"], value=numpy_helper.from_array(np.array(True)))
    choice = helper.make_node("If", ["condition"], ["chosen"], then_branch=branch, else_branch=branch)
    model.graph.node.extend([condition, choice])


def cyclic(model: onnx.ModelProto, _: Path) -> None:
    last = model.graph.node[-1]
    model.graph.node[0].input[0] = last.output[0]


def cycle_of_its_own(model: onnx.ModelProto, _: Path) -> None:
    model.graph.node.append(helper.make_node("Relu", ["b"], ["a"]))
    model.graph.node.append(helper.make_node("Relu", ["a"], ["b"]))
    output = model.graph.output[0].name
    for node in model.graph.node:
        if output in node.output:
            node.output[list(node.output).index(output)] = "inner"
    model.graph.node.append(helper.make_node("Add", ["inner", "a"], [output]))


def operator(kind: str, domain: str = "", **attributes: Any) -> Change:
    """Send the output through another operator."""

    def change(model: onnx.ModelProto, _: Path) -> None:
        output = model.graph.output[0].name
        for node in model.graph.node:
            for at, name in enumerate(node.output):
                if name == output:
                    node.output[at] = "before_last"
        if domain:
            model.opset_import.append(helper.make_opsetid(domain, 1))
        model.graph.node.append(helper.make_node(kind, ["before_last"], [output], domain=domain, **attributes))

    return change


def huge_constant(sides: list[int], kind: str = "ConstantOfShape") -> Change:
    """Multiply the output by the mean of a huge constant."""

    def change(model: onnx.ModelProto, _: Path) -> None:
        operator("Identity")(model, Path())
        shape = numpy_helper.from_array(np.array(sides, np.int64), "huge_shape")
        model.graph.initializer.append(shape)
        one = numpy_helper.from_array(np.ones(1, np.float32), "one")
        model.graph.initializer.append(one)
        inputs = ["huge_shape"] if kind == "ConstantOfShape" else ["one", "huge_shape"]
        last = model.graph.node.pop()
        model.graph.node.extend(
            [
                helper.make_node(kind, inputs, ["huge"]),
                helper.make_node("ReduceMean", ["huge"], ["mean_of_huge"], keepdims=0),
                helper.make_node("Mul", [last.input[0], "mean_of_huge"], [last.output[0]]),
            ]
        )

    return change


def claimed_shape(sides: list[int]) -> Change:
    """A weight claims a shape for which it has no data."""

    def change(model: onnx.ModelProto, _: Path) -> None:
        del model.graph.initializer[0].dims[:]
        model.graph.initializer[0].dims.extend(sides)

    return change


def nested(depth: int) -> Change:
    """Subgraphs in subgraphs, written by hand: the package refuses to."""

    def change(model: onnx.ModelProto, _: Path) -> bytes:
        graph = b""
        for _level in range(depth):
            attribute = field(1, b"then_branch") + field(6, graph) + bytes([20 << 3 & 0xFF | 0x80, 1, 5])
            graph = field(1, field(1, b"c") + field(2, b"o") + field(4, b"If") + field(5, attribute))
        return field(7, graph)  # protobuf merges it into the graph before it

    return change


def field(number: int, content: bytes) -> bytes:
    """Return a length-delimited field in protobuf's wire format."""
    length, varint = len(content), b""
    while length > 0x7F:
        varint += bytes([length & 0x7F | 0x80])
        length >>= 7
    return bytes([number << 3 | 2]) + varint + bytes([length]) + content


def many_nodes(model: onnx.ModelProto, _: Path) -> None:
    """A long chain of operators without effect: a correct graph."""
    operator("Identity")(model, Path())
    last = model.graph.node.pop()
    name = last.input[0]
    for number in range(4_000):
        model.graph.node.append(helper.make_node("Identity", [name], [f"chain_{number}"]))
        name = f"chain_{number}"
    model.graph.node.append(helper.make_node("Identity", [name], [last.output[0]]))


def wrong_type(model: onnx.ModelProto, _: Path) -> None:
    model.graph.initializer[0].data_type = TensorProto.STRING


def unknown_type(model: onnx.ModelProto, _: Path) -> None:
    model.graph.initializer[0].data_type = 4711


def control_names(model: onnx.ModelProto, _: Path) -> None:
    """Escape sequences in the names of the graph and its outputs, and an operator that fails with them."""
    model.graph.name = "\x1b]0;owned\x07\x1b[2J"
    operator("Nonsense\x1b[31m\r\nfake: line")(model, Path())


def no_outputs(model: onnx.ModelProto, _: Path) -> None:
    del model.graph.output[:]


def huge_batch(model: onnx.ModelProto, _: Path) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**62


# name -> change, and whether the bundle has to be refused
GRAPHS: dict[str, tuple[Change, bool]] = {
    "external data in the parent folder": (external(f"../{SECRET}"), True),
    "external data in the parent folder, spelled differently": (external(f"./x/../../{SECRET}"), True),
    "external data at an absolute path": (absolute, True),
    "external data in /proc": (external("/proc/self/environ"), True),
    "external data without a name": (external(""), True),
    "external data through a link": (linked, True),
    "external data through a linked folder": (linked_folder, True),
    "external data that is missing": (external("missing.data"), True),
    "external data of terabytes": (external("denoiser.onnx", 0, 2**42), True),
    "external data at a negative offset": (external("denoiser.onnx", -1, 16), True),
    "external data in a subgraph": (hidden_in_a_subgraph, True),
    "a cycle through the whole graph": (cyclic, True),
    "a cycle of two operators": (cycle_of_its_own, True),
    "an operator of another domain": (operator("Run", "evil.example"), True),
    "an operator that loads machine code": (
        operator("EPContext", "com.microsoft", embed_mode=0, ep_cache_context=f"../{SECRET}", source="x"),
        True,
    ),
    "a Python operator": (operator("PyOp", "com.microsoft", module="os", class_name="system"), True),
    "a constant of terabytes": (huge_constant([2**14, 2**14, 2**14]), True),
    "an expanded constant of terabytes": (huge_constant([2**14, 2**14, 2**14], "Expand"), True),
    "a constant whose size overflows": (huge_constant([2**40, 2**40]), True),
    "a constant of a negative size": (huge_constant([-5, 3]), False),
    "a weight that claims terabytes": (claimed_shape([2**21, 2**21]), True),
    "a weight of a negative size": (claimed_shape([-1]), True),
    "a weight whose size overflows": (claimed_shape([2**62, 2**62]), True),
    "a weight of type string": (wrong_type, True),
    "a weight of an unknown type": (unknown_type, True),
    "subgraphs nested 90 deep": (nested(90), True),
    "subgraphs nested 5,000 deep": (nested(5000), True),
    "4,000 operators without effect": (many_nodes, False),
    "names with escape sequences": (control_names, True),
    "no outputs": (no_outputs, True),
    "a batch of 2**62": (huge_batch, False),
}
