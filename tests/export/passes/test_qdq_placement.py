"""export/passes/qdq_placement.py: where Q/DQ pairs are, their types, and how engines run them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.models.adapter import adapter_for
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.rewrite import Rewrite
from diffpress.export.passes.qdq_placement import Placement
from diffpress.runtime.engines import available, load_engine
from tests.export.oracle import inputs_for, quantized_graph, run_exactly

# concatenations of the small U-Net's residual stream with its skip connections
CONCATS = 4


def pairs(graph: onnx.GraphProto) -> list[str]:
    return [node.name for node in graph.node if node.op_type == "QuantizeLinear"]


@pytest.mark.parametrize("residual_outputs", [False, True])
def test_onnxruntime_computes_every_layer_that_is_not_sensitive_on_integers(
    residual_outputs: bool, unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    sensitive = adapter_for(unet.model).sensitive_layers(unet.model)
    quantization = scales(unet, outputs=True, residual_outputs=residual_outputs)
    amax = {k: v for k, v in quantization.amax.items() if k.rsplit(".", 1)[0] not in sensitive or k == "conv_in.output"}
    if not residual_outputs:
        amax.pop("conv_in.output")
    save_graph(quantized_graph(unet_graph, Quantization("int8", amax)), tmp_path / "q.onnx")
    precision_report = load_engine(tmp_path / "q.onnx", "onnxruntime", 1).precision_report(inputs_for(unet))
    modules = dict(unet.model.named_modules())
    assert {layer for layer in precision_report.float_layers if layer in modules} == set(sensitive) - {
        "class_embedding"
    }


def test_residual_concatenations_copy_integers_in_onnxruntime(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    found = {}
    for residual_outputs in (False, True):
        save_graph(
            quantized_graph(unet_graph, scales(unet, outputs=True, residual_outputs=residual_outputs)),
            tmp_path / "q.onnx",
        )
        options = onnxruntime.SessionOptions()
        options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
        onnxruntime.InferenceSession(str(tmp_path / "q.onnx"), options, providers=["CPUExecutionProvider"])
        optimized = onnx.load(tmp_path / "optimized.onnx").graph
        found[residual_outputs] = Counter(node.op_type for node in optimized.node)
    assert found[False]["QLinearConcat"] == 0 and found[True]["QLinearConcat"] == CONCATS
    assert found[True]["QLinearAdd"] >= 8 > found[False]["QLinearAdd"]  # the sums of resnets


@pytest.mark.skipif("openvino" not in available(), reason="needs openvino")
def test_residual_concatenations_copy_integers_in_openvino(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    import openvino

    copied, reordered = {}, {}
    for residual_outputs in (False, True):
        save_graph(
            quantized_graph(unet_graph, scales(unet, outputs=True, residual_outputs=residual_outputs)),
            tmp_path / "q.onnx",
        )
        core = openvino.Core()
        model = core.read_model(tmp_path / "q.onnx")
        model.reshape({name: array.shape for name, array in inputs_for(unet).items()})
        compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        layers = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
        kinds = Counter((str(i["layerType"].astype(str)), str(i["outputPrecisions"].astype(str))) for i in layers)
        copied[residual_outputs] = kinds["Concatenation", "u8"] + kinds["Concatenation", "i8"]
        reordered[residual_outputs] = kinds["Reorder", "f32"]
    assert copied[True] == copied[False] + CONCATS
    assert reordered[True] < reordered[False]


def test_integers_have_a_shifted_zero_point_for_cpus_and_none_for_tensorrt(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    quantization, results = scales(unet, outputs=True, residual_outputs=True), []
    for tensorrt, zero in ((False, np.uint8(128)), (True, np.int8(0))):
        model = load_all(quantized_graph(unet_graph, quantization, tensorrt=tensorrt))
        stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
        for node in model.graph.node:
            if node.op_type == "QuantizeLinear":
                assert stored[node.input[2]].dtype == zero.dtype and stored[node.input[2]] == zero
            if node.op_type == "DequantizeLinear" and node.input[0] in stored:  # a weight
                channels = stored[node.input[0]].shape[node.attribute[0].i]
                assert stored[node.input[2]].dtype == np.int8 and not stored[node.input[2]].any()
                assert stored[node.input[1]].shape == stored[node.input[2]].shape == (channels,)
        results.append(run_exactly(model, inputs_for(unet)))
    first, second = results
    np.testing.assert_array_equal(first, second)


def test_a_sum_is_rounded_once_for_all_its_readers(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    placed = pairs(quantized_graph(unet_graph, scales(unet, outputs=True, residual_outputs=True)).proto.graph)
    assert len(set(placed)) == len(placed)
    # their inputs have the scale of their source: a sum, a concatenation, an upsampling
    readers = ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.resnets.0.conv_shortcut"]
    readers += ["up_blocks.0.upsamplers.0.conv"]
    assert not {f"{layer}.input/Q" for layer in readers} & set(placed)
    assert "mid_block.resnets.0.conv1.input/Q" in placed and "mid_block.resnets.0.output/Q" in placed
    assert not any("nonlinearity" in name or "norm" in name for name in placed)


def test_a_sum_with_another_scale_than_its_reader_is_rounded_again(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    quantization = scales(unet, outputs=True, residual_outputs=True)
    quantization.amax["up_blocks.0.upsamplers.0.conv.input"] = torch.tensor(0.5)
    placed = pairs(quantized_graph(unet_graph, quantization).proto.graph)
    assert "up_blocks.0.upsamplers.0.conv.input/Q" in placed


def pairs_after(node: onnx.NodeProto, scales: dict[str, float], stored: dict[str, np.ndarray]) -> int:
    """Return the number of pairs after a node whose inputs have these scales."""
    rewrite = Rewrite(Graph(onnx.ModelProto(graph=onnx.GraphProto(name="one"))))
    for name, value in stored.items():
        rewrite.add(name, value)
    placement = Placement(rewrite, False, {name: np.array([scale], np.float32) for name, scale in scales.items()})
    rewrite.nodes.append(node)
    placement.pass_on_(node)
    return sum(entry.op_type == "QuantizeLinear" for entry in rewrite.nodes)


@pytest.mark.parametrize(
    ("operator", "inputs", "scales", "settings", "count"),
    [
        ("Concat", ["a", "b"], {"a": 0.5, "b": 0.5}, {"axis": 1}, 1),
        ("Concat", ["a", "b"], {"a": 0.5, "b": 0.25}, {"axis": 1}, 0),
        ("Concat", ["a", "b"], {"a": 0.5}, {"axis": 1}, 0),
        ("Concat", ["b", "a"], {"a": 0.5}, {"axis": 1}, 0),
        ("Resize", ["a", "", "two"], {"a": 0.5}, {"mode": "nearest"}, 1),
        ("Resize", ["a", "", "two"], {"a": 0.5}, {"mode": "linear"}, 0),
        ("Pad", ["a", "ends"], {"a": 0.5}, {}, 1),
        ("Pad", ["a", "ends", "zero"], {"a": 0.5}, {"mode": "constant"}, 1),
        ("Pad", ["a", "ends", "two"], {"a": 0.5}, {"mode": "constant"}, 0),
        ("Pad", ["a", "ends", "unknown"], {"a": 0.5}, {}, 0),
        ("Pad", ["a", "ends"], {"a": 0.5}, {"mode": "edge"}, 0),
        ("Add", ["a", "b"], {"a": 0.5, "b": 0.5}, {}, 0),
        ("Sigmoid", ["a"], {"a": 0.5}, {}, 0),
    ],
)
def test_a_pair_follows_nodes_that_only_copy_tensors_of_one_scale(
    operator: str, inputs: list[str], scales: dict[str, float], settings: dict[str, Any], count: int
) -> None:
    stored: dict[str, np.ndarray] = {
        "two": np.array(2, np.float32),
        "zero": np.zeros((), np.float32),
        "ends": np.array([0, 1], np.int64),
    }
    node = helper.make_node(operator, inputs, ["out"], "node", **settings)
    assert pairs_after(node, scales, stored) == count


def product_of(left: list[onnx.NodeProto], stored: dict[str, np.ndarray]) -> onnx.ModelProto:
    """Return a graph of the product of `left`, computed from sum "a", and of the moved sum "b"."""
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [4, 4]) for name in "xy")
    nodes = [helper.make_node("Add", [name] * 2, [name * 2], block) for name, block in (("x", "a"), ("y", "b"))]
    nodes += [*left, helper.make_node("Reshape", ["yy", "shape"], ["right"], "moved")]
    nodes.append(helper.make_node("MatMul", ["left", "right"], ["z"], "product"))
    out = helper.make_tensor_value_info("z", TensorProto.FLOAT, [4, 4])
    stored = {"shape": np.array([4, 4], np.int64), **stored}
    constants = [numpy_helper.from_array(value, name) for name, value in stored.items()]
    graph = helper.make_graph(nodes, "g", [x, y], [out], constants)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


MOVED = helper.make_node("Transpose", ["xx"], ["moved_left"], "turn", perm=[1, 0])
TIMES = helper.make_node("Mul", ["factor", "moved_left"], ["left"], "times")
SUMS = Quantization("int8", {"a.output": torch.tensor(127 / 8), "b.output": torch.tensor(127 / 4)})


@pytest.mark.parametrize("factor", [np.array(0.25, np.float32), np.array([0.25], np.float32)])
def test_a_product_of_moved_and_scaled_integers_reads_them(factor: np.ndarray) -> None:
    model = product_of([MOVED, TIMES], {"factor": factor})
    placed = load_all(quantized_graph(Graph(model), SUMS))
    makers = {name: node for node in placed.graph.node for name in node.output}
    product = makers["z"]
    assert [makers[name].op_type for name in product.input] == ["DequantizeLinear"] * 2
    assert "Mul" not in {node.op_type for node in placed.graph.node}  # the pair absorbed its factor
    x, y = np.random.default_rng(0).uniform(-4, 4, (2, 4, 4)).astype(np.float32)
    a, b = np.round(16 * x) / 8, np.round(8 * y) / 4
    # exact in float32, because steps and factor are powers of two
    np.testing.assert_array_equal(run_exactly(placed, {"x": x, "y": y}), a.T / 4 @ b)


def test_a_tensor_scaled_before_it_is_moved_keeps_its_factor() -> None:
    left = [helper.make_node("Mul", ["xx", "factor"], ["times"], "times")]
    left.append(helper.make_node("Transpose", ["times"], ["left"], "turn", perm=[1, 0]))
    placed = load_all(quantized_graph(Graph(product_of(left, {"factor": np.array(0.25, np.float32)})), SUMS))
    x, y = np.random.default_rng(0).uniform(-4, 4, (2, 4, 4)).astype(np.float32)
    a, b = np.round(16 * x) / 8, np.round(8 * y) / 4
    np.testing.assert_array_equal(run_exactly(placed, {"x": x, "y": y}), a.T / 4 @ b)


@pytest.mark.parametrize(
    ("operator", "inputs", "stored", "quantization", "tensorrt"),
    [
        ("Mul", ["xx", "factor"], {"factor": np.array(-0.25, np.float32)}, SUMS, False),
        ("Mul", ["xx", "factor"], {"factor": np.ones(4, np.float32)}, SUMS, False),
        ("Mul", ["xx", "yy"], {}, SUMS, False),
        ("Softmax", ["xx"], {}, SUMS, False),
        ("Transpose", ["xx"], {}, Quantization("int8", {"b.output": torch.tensor(127.0)}), False),
        ("Transpose", ["xx"], {}, SUMS, True),
    ],
)
def test_a_product_with_an_input_without_integer_scale_stays_in_float(
    operator: str, inputs: list[str], stored: dict[str, np.ndarray], quantization: Quantization, tensorrt: bool
) -> None:
    model = product_of([helper.make_node(operator, inputs, ["left"], "between")], stored)
    placed = quantized_graph(Graph(model), quantization, tensorrt).proto.graph
    assert {"left", "right"} == set(placed.node[-1].input)


def test_onnxruntime_computes_the_scores_of_attention_on_integers(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    graph = quantized_graph(unet_graph, scales(unet, outputs=True))
    save_graph(graph, tmp_path / "q.onnx")
    softmaxed = {node.input[0] for node in graph.proto.graph.node if node.op_type == "Softmax"}
    scores = {node.name for node in graph.proto.graph.node if softmaxed.intersection(node.output)}
    floats = load_engine(tmp_path / "q.onnx", "onnxruntime", 1).precision_report(inputs_for(unet)).float_layers
    assert len(scores) == 4 and not scores & set(floats)


def test_a_graph_output_that_is_a_sum_keeps_its_name() -> None:
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Add", ["x", "x"], ["y"], "block")], "g", [x], [y])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    placed = load_all(quantized_graph(Graph(model), Quantization("int8", {"block.output": torch.tensor(127.0)})))
    assert [value.name for value in placed.graph.output] == ["y"]
    np.testing.assert_array_equal(run_exactly(placed, {"x": np.array([0.4, 100], np.float32)}), [1, 127])
