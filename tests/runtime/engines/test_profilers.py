"""Profilers of the engines: layers with their names, MACs, bytes and precision, and times that add up."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.benchmarking.peak_kernels import convolution_graph
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.engines.executed_layers import (
    ATTENTION,
    CONVOLUTION,
    LINEAR,
    NORMALIZATION,
    OPERATIONS,
    ExecutedLayer,
)
from diffpress.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from diffpress.runtime.engines.onnxruntime.kernels import kernel_operation
from diffpress.runtime.engines.onnxruntime.profiler import tensor_owners
from diffpress.runtime.engines.openvino.profiler import OpenVinoProfiler
from diffpress.runtime.engines.tensorrt.engine import TensorRtEngine
from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.io.onnx_wire import Node
from tests.runtime.small_graphs import sample_inputs

CONV, PRODUCT, GEMM = 2 * 16 * 64 * 8 * 9, 2 * 64 * 16 * 16, 2 * 16 * 4
ENGINES = [name for name in ("onnxruntime", "openvino") if name in available()]


def profiled(path: Path, name: str, inputs: dict[str, np.ndarray], runs: int = 3) -> tuple[list[ExecutedLayer], Any]:
    with closing(load_engine(path, name, 1)) as engine:
        profiler = engine.profiler(inputs)
        for _ in range(runs):
            profiler.run()
        return profiler.finish()


@pytest.mark.parametrize("name", ENGINES)
def test_layers_have_the_names_macs_and_operations_of_the_graph(name: str, float_graph: Path) -> None:
    layers, totals = profiled(float_graph, name, sample_inputs())
    assert {layer.operation for layer in layers} <= set(OPERATIONS) and totals.shape == (3, len(layers))
    products = {layer.name: layer for layer in layers if layer.macs}
    assert {name: layer.macs for name, layer in products.items()} == {"conv": CONV, "matmul": PRODUCT, "gemm": GEMM}
    assert products["conv"].operation == CONVOLUTION and products["matmul"].operation == LINEAR
    assert {layer.precision for layer in products.values()} == {"fp32"}
    # input and output; the weights [16, 8, 3, 3] and a bias at most
    activations = 4 * (2 * 8 * 64 + 2 * 16 * 64)
    assert activations + 4 * 16 * 8 * 9 <= products["conv"].bytes <= activations + 4 * 16 * (8 * 9 + 1)


@pytest.mark.parametrize("name", ENGINES)
def test_a_quantized_layer_runs_on_integers_and_moves_fewer_bytes(
    name: str, float_graph: Path, quantized_graph: Callable[..., Path]
) -> None:
    exact, _ = profiled(float_graph, name, sample_inputs())
    rounded, _ = profiled(quantized_graph("Conv", "MatMul", "Gemm"), name, sample_inputs())
    (before,) = (layer for layer in exact if layer.operation == CONVOLUTION)
    (after,) = (layer for layer in rounded if layer.operation == CONVOLUTION)
    assert (before.precision, after.precision) == ("fp32", "int8") and after.is_integer
    assert before.macs == after.macs and after.bytes < before.bytes


@pytest.mark.parametrize("name", ENGINES)
def test_times_accumulate_over_the_runs_and_are_part_of_their_wall_time(name: str, tmp_path: Path) -> None:
    data, shape = convolution_graph("fp32")  # long enough that little lies between its kernels
    path = tmp_path / "large.onnx"
    path.write_bytes(data)
    with closing(load_engine(path, name, 1)) as engine:
        profiler = engine.profiler({"x": np.zeros(shape, np.float32)})
        profiler.run()
        start, computed = time.perf_counter(), time.process_time()
        for _ in range(5):
            profiler.run()
        wall_ms, cpu_ms = (time.perf_counter() - start) * 1e3, (time.process_time() - computed) * 1e3
        _, totals = profiler.finish()
    assert (np.diff(totals, axis=0) >= 0.0).all()
    # beside other programs, wall time passes between the kernels, but this process does not compute in it
    assert 0.3 * min(cpu_ms, wall_ms) < (totals[-1] - totals[0]).sum() < 1.02 * wall_ms


def test_openvino_counters_are_averages_of_all_runs_so_far(monkeypatch: pytest.MonkeyPatch) -> None:
    averages = iter([4.0, 3.0, 3.0])  # ms: the runs took 4, 2 and 3

    class Request:
        def infer(self, *_: object, **__: object) -> None:
            counter = SimpleNamespace(node_name="a", real_time=timedelta(milliseconds=next(averages)))
            self.profiling_info = [counter, SimpleNamespace(node_name="unused", real_time=timedelta(0))]

    compiled = SimpleNamespace(create_infer_request=Request, get_runtime_model=lambda: SimpleNamespace(get_ops=list))
    profiler = OpenVinoProfiler(SimpleNamespace(get_ops=list), compiled, {})
    for _ in range(3):
        profiler.run()
    layers, totals = profiler.finish()
    assert [layer.name for layer in layers] == ["a"]
    np.testing.assert_allclose(totals[:, 0], [4.0, 6.0, 9.0])
    assert profiler.kernel_ms() == pytest.approx({"a": 2.5, "unused": 0.0})  # without the first run


@pytest.mark.parametrize("name", ENGINES)
def test_a_product_of_two_activations_is_attention_and_a_normalization_is_one(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    nodes = [
        helper.make_node("LayerNormalization", ["x", "scale"], ["n"], name="norm"),
        helper.make_node("Transpose", ["n"], ["k"], perm=[0, 2, 1], name="turn"),
        helper.make_node("MatMul", ["n", "k"], ["s"], name="scores"),
        helper.make_node("Softmax", ["s"], ["p"], name="softmax"),
        helper.make_node("MatMul", ["p", "n"], ["o"], name="values"),
        helper.make_node("MatMul", ["o", "w"], ["y"], name="to_out"),
    ]
    value, kind = helper.make_tensor_value_info, onnx.TensorProto.FLOAT
    rng = np.random.default_rng(0)
    weights = {"scale": np.ones(16, np.float32), "w": rng.standard_normal((16, 16)).astype(np.float32)}
    graph = helper.make_graph(
        nodes,
        "attention",
        [value("x", kind, [2, 24, 16])],
        [value("y", kind, [2, 24, 16])],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    path = tmp_path / "attention.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10), path)
    layers, _ = profiled(path, name, {"x": rng.standard_normal((2, 24, 16)).astype(np.float32)}, runs=20)
    macs = {operation: sum(one.macs for one in layers if one.operation == operation) for operation in OPERATIONS}
    assert macs[ATTENTION] == 2 * (2 * 24 * 24 * 16) and macs[LINEAR] == 2 * 24 * 16 * 16
    assert any(layer.operation == NORMALIZATION for layer in layers)


def test_a_batched_product_with_weights_is_no_attention() -> None:
    shapes = [{"float": [2, 24, 16]}, {"float": [2, 16, 24]}]
    node = {"op_name": "MatMul", "input_type_shape": shapes, "output_type_shape": [{"float": [2, 24, 24]}]}
    size = 4 * 2 * 24 * 16
    assert kernel_operation(node | {"activation_size": str(2 * size), "parameter_size": "0"}) == ATTENTION
    assert kernel_operation(node | {"activation_size": str(size), "parameter_size": str(size)}) == LINEAR


def test_blocked_convolutions_belong_to_the_node_that_writes_their_tensor() -> None:
    nodes = [
        Node("Conv", "layer", ("x", "w"), ("c",)),
        Node("Relu", "act", ("c",), ("r",)),
        Node("Mul", "other", ("r", "r"), ("m",)),
        Node("Relu", "act2", ("m",), ("z",)),
    ]
    assert tensor_owners(nodes) == {"c": "layer", "r": "layer"}


def test_engines_that_cannot_say_what_their_layers_are_refuse(float_graph: Path) -> None:
    with pytest.raises(EngineUnavailableError, match="an engine does not report their products"):
        TensorRtEngine.profiler(SimpleNamespace(_path=float_graph), {})  # type: ignore[arg-type]
    engine = OnnxRuntimeEngine(float_graph, load_options())
    engine.device = "cuda"
    with pytest.raises(EngineUnavailableError, match="times the launch of kernels"):
        engine.profiler(sample_inputs())


def load_options() -> Any:
    from diffpress.runtime.engines.options import EngineOptions

    return EngineOptions(threads=1)
