"""runtime/io/onnx_wire.py against the package onnx: the same nodes, and files that onnx accepts and computes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.io.onnx_wire import Node, model_bytes, read_nodes

onnx = pytest.importorskip("onnx")


def test_the_nodes_are_those_that_onnx_reads(float_graph: Path, tiny: Path) -> None:
    for path in (float_graph, tiny / "denoiser.onnx"):
        expected = [
            Node(node.op_type, node.name, tuple(node.input), tuple(node.output)) for node in onnx.load(path).graph.node
        ]
        assert read_nodes(path) == expected and expected


@pytest.mark.parametrize("end", [7, 40, 100])
def test_a_truncated_file_raises_instead_of_returning_fewer_nodes(end: int, tiny: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.onnx"
    path.write_bytes((tiny / "denoiser.onnx").read_bytes()[:end])
    with pytest.raises(ValueError, match=r"ends|wire type"):
        read_nodes(path)


def test_a_written_graph_is_valid_and_computes_what_its_nodes_say() -> None:
    from onnx.reference import ReferenceEvaluator

    rng = np.random.default_rng(0)
    weight, bias = rng.standard_normal((300, 5)).astype(np.float32), np.array([2.0], np.float32)
    nodes = [
        (Node("MatMul", "product", ("x", "w"), ("p",)), {}),
        (Node("Transpose", "turn", ("p",), ("t",)), {"perm": (1, 0)}),
        (Node("Add", "sum", ("t", "b"), ("y",)), {}),
    ]
    model = onnx.load_from_string(model_bytes(nodes, {"w": weight, "b": bias}, {"x": (4, 300)}, {"y": (5, 4)}))
    onnx.checker.check_model(model, full_check=True)
    x = rng.standard_normal((4, 300)).astype(np.float32)
    out = np.asarray(next(iter(ReferenceEvaluator(model).run(None, {"x": x}))))
    np.testing.assert_allclose(out, (x @ weight).T + 2.0, rtol=1e-4)
