"""A graph with one Conv, one MatMul and one Gemm, in float and quantized with Q/DQ pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest


def sample_inputs(seed: int = 0) -> dict[str, np.ndarray]:
    return {"sample": np.random.default_rng(seed).standard_normal((2, 8, 8, 8), dtype=np.float32)}


def write_float_graph(path: Path) -> None:
    """Write the graph: [N, 8, 8, 8] -> Conv 3x3 to 16 channels -> tokens -> MatMul 16x16 -> mean -> Gemm 16x4."""
    onnx = pytest.importorskip("onnx")
    helper, rng = onnx.helper, np.random.default_rng(0)

    def weight(name: str, *shape: int) -> object:
        return onnx.numpy_helper.from_array(rng.standard_normal(shape).astype(np.float32) * 0.2, name)

    constants = [
        weight("filters", 16, 8, 3, 3),
        weight("square", 16, 16),
        weight("last", 16, 4),
        onnx.numpy_helper.from_array(np.array([0, 16, 64], np.int64), "tokens"),
        onnx.numpy_helper.from_array(np.array([1], np.int64), "axis"),
    ]
    nodes = [
        helper.make_node("Conv", ["sample", "filters"], ["c"], pads=[1, 1, 1, 1], name="conv"),
        helper.make_node("Reshape", ["c", "tokens"], ["r"]),
        helper.make_node("Transpose", ["r"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["t", "square"], ["m"], name="matmul"),
        helper.make_node("ReduceMean", ["m", "axis"], ["mean"], keepdims=0),
        helper.make_node("Gemm", ["mean", "last"], ["out_sample"], name="gemm"),
    ]
    value = helper.make_tensor_value_info
    inputs = [value("sample", onnx.TensorProto.FLOAT, ["batch", 8, 8, 8])]
    outputs = [value("out_sample", onnx.TensorProto.FLOAT, ["batch", 4])]
    graph = helper.make_graph(nodes, "small", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, path)


def write_quantized_graph(float_graph: Path, path: Path, kinds: Sequence[str]) -> None:
    """Write the graph with Q/DQ pairs around the operators of these types, weights in int8."""
    pytest.importorskip("onnxruntime.quantization")
    from onnxruntime import quantization

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.remaining = [sample_inputs(seed) for seed in range(4)]

        def get_next(self) -> dict[str, np.ndarray] | None:
            return self.remaining.pop() if self.remaining else None

    quantization.quantize_static(
        float_graph, path, Reader(), quant_format=quantization.QuantFormat.QDQ, op_types_to_quantize=list(kinds),
        per_channel=True, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
    )  # fmt: skip
