"""export/passes/controlled_graph.py: residuals are added where a U-Net reads its skip connections, and nowhere else."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffpress.export.passes.controlled_graph import controlled_file, controlled_graph, write_controlled_graph
from diffpress.runtime.engines import load_engine
from diffpress.runtime.errors import InvalidInputError

B, C, SIDE = 2, 3, 4
SCALE = np.float32(1 / 64)  # int8 reaches from -2 to 2
DIMS: list[int | str] = ["batch", C, "height", "width"]
RESIDUALS = dict.fromkeys(("down_block_residual_0", "down_block_residual_1", "mid_block_residual"), DIMS)
X = np.random.default_rng(0).normal(size=(B, C, SIDE, SIDE)).astype(np.float32)
VALUES = {name: X * np.float32(k + 1) / 2 for k, name in enumerate(RESIDUALS)}


def graph(rounded: bool = False, half: bool = False) -> onnx.ModelProto:
    """Return a network that concatenates its input with itself, and then hidden states with two skip connections.

    skip_0 = x + x', skip_1 = 2 skip_0, hidden = -skip_1, out = [-[hidden, skip_1], skip_0]; the first concatenation is
    rounded, and read by a negation and by a convolution that is added up. `half` computes in float16.
    """
    kind = TensorProto.FLOAT16 if half else TensorProto.FLOAT
    nodes = [
        helper.make_node("Cast", ["sample"], ["x"], to=kind),
        helper.make_node("Concat", ["x", "x"], ["twice"], "inputs", axis=1),
        helper.make_node("Split", ["twice"], ["left", "right"], axis=1, num_outputs=2),
        helper.make_node("Add", ["left", "right"], ["skip_0"]),
        helper.make_node("Add", ["skip_0", "skip_0"], ["skip_1"]),
        helper.make_node("Neg", ["skip_1"], ["hidden"]),
        helper.make_node("Concat", ["hidden", "skip_1"], ["cat_1.float" if rounded else "cat_1"], "cat_1", axis=1),
        helper.make_node("Neg", ["cat_1"], ["negative"]),
        helper.make_node("Conv", ["cat_1", "weight"], ["convolved"]),
        helper.make_node("Concat", ["negative", "skip_0"], ["cat_0"], "cat_0", axis=1),
        helper.make_node("Concat", ["shape", "shape"], ["shapes"], "shapes", axis=0),
        helper.make_node("Concat", ["cat_0", "convolved", "convolved"], ["all"], "all", axis=1),
        helper.make_node("Cast", ["all"], ["out"], to=TensorProto.FLOAT),
    ]
    if rounded:
        pair = [
            helper.make_node("QuantizeLinear", ["cat_1.float", "scale", "zero"], ["cat_1.integer"]),
            helper.make_node("DequantizeLinear", ["cat_1.integer", "scale", "zero"], ["cat_1"]),
        ]
        nodes[7:7] = pair
    stored = {
        "weight": np.ones((1, 2 * C, 1, 1), np.float16 if half else np.float32),
        "shape": np.zeros(1, np.int64),
        "scale": SCALE,
        "zero": np.int8(0),
    }
    inner = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("sample", TensorProto.FLOAT, DIMS)],
        [
            helper.make_tensor_value_info("out", TensorProto.FLOAT, ["batch", 3 * C + 2, "height", "width"]),
            helper.make_tensor_value_info("skip_1", kind, DIMS),  # a feature of a step cache
        ],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in stored.items()],
    )
    return helper.make_model(inner, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def run(proto: onnx.ModelProto, path: Path, **inputs: np.ndarray) -> np.ndarray:
    onnx.checker.check_model(proto)
    onnx.save(proto, path)
    with closing(load_engine(path, "onnxruntime", 1)) as engine:
        return engine.run({"sample": X, **inputs})


@pytest.mark.parametrize("rounded", [False, True])
def test_residuals_are_added_to_skip_connections_and_the_middle(rounded: bool, tmp_path: Path) -> None:
    plain = graph(rounded)
    before = plain.SerializeToString()
    made = controlled_graph(plain, RESIDUALS)
    assert plain.SerializeToString() == before
    assert [value.name for value in made.graph.input] == ["sample", *RESIDUALS]
    assert [value.name for value in made.graph.output] == ["out"]
    found = run(made, tmp_path / "graph.onnx", **VALUES)
    down_0, down_1, mid = VALUES.values()
    cat_1 = np.concatenate([-4 * X + mid, 4 * X + down_1], axis=1)
    # a layer with weights reads integers; everything else reads the sum before it is rounded and clipped
    read = np.clip(np.round(cat_1 / SCALE), -128, 127) * SCALE if rounded else cat_1
    layer = read.sum(axis=1, keepdims=True)
    expected = np.concatenate([-cat_1, 2 * X + down_0, layer, layer], axis=1)
    assert np.allclose(found, expected, atol=1e-4)
    assert np.abs(cat_1).max() > 4, "nothing would be clipped"


def test_residuals_are_added_in_half_precision(tmp_path: Path) -> None:
    made, wide = controlled_graph(graph(half=True), RESIDUALS), controlled_graph(graph(), RESIDUALS)
    found, expected = (run(one, tmp_path / f"{k}.onnx", **VALUES) for k, one in enumerate((made, wide)))
    assert 0 < np.abs(found - expected).max() < 0.1


def test_residuals_of_zero_change_no_bit(tmp_path: Path) -> None:
    zero = {name: np.zeros_like(X) for name in RESIDUALS}
    plain, made = run(graph(), tmp_path / "plain.onnx"), controlled_graph(graph(), RESIDUALS)
    assert np.array_equal(run(made, tmp_path / "made.onnx", **zero), plain)


def test_a_graph_with_too_few_skip_connections_is_refused() -> None:
    more = {f"down_block_residual_{k}": DIMS for k in range(9)}
    with pytest.raises(InvalidInputError, match="3 skip connections for 9 residuals"):
        controlled_graph(graph(), more)


def test_the_file_refers_to_the_weights_of_the_plain_graph(tmp_path: Path) -> None:
    path = tmp_path / "denoiser.onnx"
    onnx.save(graph(), path, save_as_external_data=True, location="weights", size_threshold=0)
    assert controlled_file(path.name) == "denoiser.control.onnx"
    data = (tmp_path / "weights").read_bytes()
    size = write_controlled_graph(path, tmp_path / "denoiser.control.onnx", RESIDUALS)
    assert size == (tmp_path / "denoiser.control.onnx").stat().st_size and (tmp_path / "weights").read_bytes() == data
    with closing(load_engine(tmp_path / "denoiser.control.onnx", "onnxruntime", 1)) as engine:
        assert np.isfinite(engine.run({"sample": X, **VALUES})).all()
