"""export/verify/float16_range.py: find overflows that engines on the CPU hide, and name the node."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.passes.half_precision import to_half
from diffpress.export.verify.float16_range import LARGEST, Probed, write_probed
from diffpress.runtime.engines import load_engine
from diffpress.runtime.errors import GateFailedError


@pytest.fixture
def graph() -> Graph:
    """Graph of y = (sample @ first) @ second with all-ones [4, 4] weights: 4 times the sum of the sample."""
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 4]) for name in ("sample", "out_sample")]
    nodes = [
        helper.make_node("MatMul", ["sample", "a"], ["between"], "first"),
        helper.make_node("MatMul", ["between", "b"], ["out_sample"], "second"),
    ]
    stored = [numpy_helper.from_array(np.ones((4, 4), np.float32), name) for name in "ab"]
    inner = helper.make_graph(nodes, "g", ends[:1], ends[1:], stored)
    return to_half(Graph(helper.make_model(inner, opset_imports=[helper.make_opsetid("", 18)])), "fp16")[0]


@pytest.fixture
def probed(graph: Graph, tmp_path: Path) -> Probed:
    save_graph(graph, tmp_path / "g.onnx")
    nodes = write_probed(tmp_path / "g.onnx", tmp_path / "p.onnx")
    return Probed(load_engine(tmp_path / "p.onnx", "onnxruntime", 1), nodes)


def run(network: Probed, value: float) -> np.ndarray:
    return network.run({"sample": np.array([[0, 0, 0, value], [0, 0, 0, 1]], np.float32)})


def test_the_largest_number_of_all_runs_is_recorded_and_the_output_is_the_graphs(probed: Probed, graph: Graph) -> None:
    for value in (3.0, -500.0, 2.0):
        np.testing.assert_allclose(run(probed, value)[0], 4 * value)
    assert probed.check("g.onnx") == 2000
    outputs = probed.run_all({"sample": np.ones((1, 4), np.float32)})
    assert list(outputs) == ["out_sample"] and LARGEST not in outputs


@pytest.mark.parametrize(("value", "node"), [(20000.0, "second"), (-80000.0, "")])
def test_a_node_that_overflows_is_named(value: float, node: str, probed: Probed) -> None:
    run(probed, 1.0)
    probed.check("g.onnx")
    run(probed, value)
    with pytest.raises(
        GateFailedError, match=f"g.onnx: node .{node}.* writes .*, which exceeds the float16 maximum of 65504"
    ) as caught:
        probed.check("g.onnx")
    assert "\n" not in str(caught.value)


def test_nan_is_out_of_range(probed: Probed) -> None:
    run(probed, np.nan)
    run(probed, 1.0)
    with pytest.raises(GateFailedError, match="writes nan"):
        probed.check("g.onnx")


def test_the_original_graph_is_not_changed(graph: Graph, tmp_path: Path) -> None:
    save_graph(graph, tmp_path / "g.onnx", data="weights")
    before = (tmp_path / "g.onnx").read_bytes()
    nodes = write_probed(tmp_path / "g.onnx", tmp_path / "p.onnx")
    assert (tmp_path / "g.onnx").read_bytes() == before
    onnx.checker.check_model(str(tmp_path / "p.onnx"))
    assert set(nodes) == {"sample.float16/Cast", "first", "second"}
