"""export/graph/read.py: a file's graph with its weights, wherever they are stored."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from onnx import TensorProto, helper

from diffpress.export.graph.model import Graph, Weight, load_all, save_graph, stub
from diffpress.export.graph.read import read_graph

WIDE = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
FOUR_BITS = np.random.default_rng(0).integers(-8, 8, (64, 63)).astype(ml_dtypes.int4)


def graph_of(array: np.ndarray) -> Graph:
    """Return a graph that casts one weight to float32."""
    weight = Weight(array.dtype, array.shape, partial(np.asarray, array))
    nodes = [helper.make_node("Cast", ["weight"], ["out"], to=TensorProto.FLOAT)]
    out = helper.make_tensor_value_info("out", TensorProto.FLOAT, array.shape)
    proto = helper.make_model(
        helper.make_graph(nodes, "one", [], [out], [stub("weight", weight)]),
        opset_imports=[helper.make_opsetid("", 21)],
        ir_version=10,
    )
    return Graph(proto, {"weight": weight})


@pytest.mark.parametrize("array", [WIDE, WIDE.astype(np.float16), FOUR_BITS], ids=["float32", "float16", "int4"])
@pytest.mark.parametrize("data", [None, "weights.bin"])
def test_a_graph_is_read_and_written_again_with_the_same_weights(
    array: np.ndarray, data: str | None, tmp_path: Path
) -> None:
    save_graph(graph_of(array), tmp_path / "first.onnx", data=data)
    if data is not None:
        os.link(tmp_path / data, tmp_path / "second link")  # as in a bundle that reuses a component
    found = read_graph(tmp_path / "first.onnx")
    assert set(found.weights) == (set() if data is None else {"weight"})
    save_graph(found, tmp_path / "again.onnx")
    assert load_all(read_graph(tmp_path / "again.onnx")) == load_all(graph_of(array))


def test_reading_a_graph_reads_none_of_its_data_file(tmp_path: Path) -> None:
    save_graph(graph_of(WIDE), tmp_path / "first.onnx", data="weights.bin")
    found = read_graph(tmp_path / "first.onnx")
    (tmp_path / "weights.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"buffer|reshape|size"):
        found.weights["weight"].read()
