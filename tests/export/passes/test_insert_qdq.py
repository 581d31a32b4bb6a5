"""export/passes/insert_qdq.py: Q/DQ graphs compare with fake quantization in torch, in every engine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, quantized_graph, run_exactly, with_recorded_reads

LEVELS = onnxruntime.GraphOptimizationLevel


def only(quantization: Quantization, layer: str) -> Quantization:
    return Quantization("int8", {k: v for k, v in quantization.amax.items() if k.rsplit(".", 1)[0] == layer})


@pytest.mark.parametrize(
    "layer", ["first", "twin_b", "down", "up", "embedding", "gemm", "matmul", "unbiased", "twice", "line"]
)
def test_a_quantized_layer_computes_what_torch_fake_quantization_does(
    layer: str,
    everything: Checkpoint,
    everything_graph: Graph,
    scales: Callable[..., Quantization],
    fake_quant: Callable[..., np.ndarray],
) -> None:
    quantization = only(scales(everything, outputs=True), layer)
    inputs = inputs_for(everything)
    expected = fake_quant(everything, quantization, inputs)
    found = run_exactly(quantized_graph(everything_graph, quantization), inputs)
    plain = TorchNetwork(everything.model, everything.spec).run(inputs)
    # a few values round differently, where torch and ONNX Runtime differ in the last bit before the rounding
    assert np.median(np.abs(found - expected)) < 2e-6
    assert sqnr_db(expected, found) > sqnr_db(plain, expected) + 10
    assert sqnr_db(plain, expected) < 95


@pytest.mark.parametrize(("outputs", "residual_outputs"), [(False, False), (True, False), (True, True)])
def test_a_quantized_unet_computes_what_torch_fake_quantization_does(
    outputs: bool,
    residual_outputs: bool,
    unet: Checkpoint,
    unet_graph: Graph,
    scales: Callable[..., Quantization],
    fake_quant: Callable[..., np.ndarray],
) -> None:
    quantization, inputs = scales(unet, outputs=outputs, residual_outputs=residual_outputs), inputs_for(unet)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    expected = fake_quant(unet, quantization, inputs)
    found = run_exactly(quantized_graph(unet_graph, quantization), inputs)
    assert sqnr_db(expected, found) > sqnr_db(plain, expected) + 6
    assert abs(sqnr_db(plain, found) - sqnr_db(plain, expected)) < 0.3


@pytest.mark.parametrize("engine", available())
@pytest.mark.parametrize("residual_outputs", [False, True])
@pytest.mark.parametrize("outputs", [False, True])
def test_engines_reach_the_sqnr_of_fake_quantization(
    engine: str,
    outputs: bool,
    residual_outputs: bool,
    unet: Checkpoint,
    unet_graph: Graph,
    scales: Callable[..., Quantization],
    fake_quant: Callable[..., np.ndarray],
    tmp_path: Path,
) -> None:
    # weights within 7 bits: processors without VNNI saturate otherwise
    quantization, inputs = (
        scales(unet, outputs=outputs, residual_outputs=residual_outputs, weight_range=127 / 64),
        inputs_for(unet),
    )
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    save_graph(quantized_graph(unet_graph, quantization), tmp_path / "q.onnx")
    found = load_engine(tmp_path / "q.onnx", engine, threads=1).run(inputs)
    assert sqnr_db(plain, found) > sqnr_db(plain, fake_quant(unet, quantization, inputs)) - 1.0


def test_output_scales_let_onnxruntime_compute_on_integers(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    shares = {}
    for outputs in (False, True):
        save_graph(quantized_graph(unet_graph, scales(unet, outputs=outputs)), tmp_path / "q.onnx")
        share = load_engine(tmp_path / "q.onnx", "onnxruntime", 1).integer_mac_share(inputs_for(unet))
        assert share is not None
        shares[outputs] = share
    assert shares[False] < 0.2 and shares[True] > 0.9


def test_the_file_shrinks_to_about_a_quarter(
    wide: Checkpoint, wide_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    save_graph(wide_graph, tmp_path / "f.onnx")
    save_graph(quantized_graph(wide_graph, scales(wide)), tmp_path / "q.onnx")
    assert (tmp_path / "q.onnx").stat().st_size < 0.28 * (tmp_path / "f.onnx").stat().st_size


def test_weights_are_stored_as_int8_and_no_float_copy_is_left(
    everything: Checkpoint, everything_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    graph = load_all(quantized_graph(everything_graph, scales(everything))).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weight = numpy_helper.to_array(stored["first.weight_int8"])
    assert weight.dtype == np.int8 and weight.shape == (8, 2, 3, 3) and np.abs(weight).max() == 127
    heavy = [t.name for t in graph.initializer if t.data_type == TensorProto.FLOAT and len(t.dims) > 1]
    assert heavy == []
    assert not set(stored) - {name for node in graph.node for name in node.input}


def test_the_float_graph_is_not_changed(
    everything_graph: Graph, everything: Checkpoint, scales: Callable[..., Quantization]
) -> None:
    def written(graph: Graph) -> bytes:
        return load_all(graph).SerializeToString(deterministic=True)

    before = written(everything_graph)
    first = quantized_graph(everything_graph, scales(everything))
    assert written(everything_graph) == before
    assert written(quantized_graph(everything_graph, scales(everything))) == written(first)


def test_a_weight_is_quantized_only_when_it_is_written(
    everything: Checkpoint, everything_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    reads: list[str] = []
    quantization = scales(everything)
    graph = quantized_graph(with_recorded_reads(everything_graph, reads), quantization)
    assert reads == [] and set(graph.weights) == {f"{layer}.weight_int8" for layer in quantization.layers}
    for layer, axis in (("first", 0), ("up", 1), ("embedding", 0), ("gemm", 0), ("matmul", 0)):
        stored = graph.weights[f"{layer}.weight_int8"]
        weight = everything.model.get_parameter(f"{layer}.weight").detach().numpy()
        weight = weight[:, :, None, None] if layer == "matmul" else weight  # written as a convolution
        scale = quantization.amax[f"{layer}.weight"].numpy() / np.float32(127)
        shape = [-1 if i == axis else 1 for i in range(weight.ndim)]
        expected = np.clip(np.rint(weight / scale.reshape(shape)), -127, 127)
        assert stored.dtype == np.int8 and stored.shape == weight.shape
        np.testing.assert_array_equal(stored.read(), expected)
    assert len(reads) == 5


def test_readers_of_one_tensor_with_one_scale_share_a_pair(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    quantization = scales(unet)
    names = [f"mid_block.attentions.0.{projection}" for projection in ("to_q", "to_k", "to_v")]
    few = {f"{name}.{kind}": quantization.amax[f"{name}.{kind}"] for name in names for kind in ("weight", "input")}
    graph = quantized_graph(unet_graph, Quantization("int8", few)).proto.graph
    assert Counter(node.op_type for node in graph.node)["QuantizeLinear"] == 1
    few[f"{names[0]}.input"] = few[f"{names[0]}.input"] * 2
    graph = quantized_graph(unet_graph, Quantization("int8", few)).proto.graph
    assert Counter(node.op_type for node in graph.node)["QuantizeLinear"] == 2


def test_a_layer_without_input_scale_computes_in_float(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], fake_quant: Callable[..., np.ndarray]
) -> None:
    name = "time_embedding.linear_1"
    quantization = only(scales(unet, weight_only=(name,)), name)
    graph = quantized_graph(unet_graph, quantization)
    assert not any(node.op_type == "QuantizeLinear" for node in graph.proto.graph.node)
    inputs = inputs_for(unet)
    np.testing.assert_allclose(run_exactly(graph, inputs), fake_quant(unet, quantization, inputs), atol=2e-5)


@pytest.mark.parametrize("kind", ["weight", "input", "output"])
@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), None])
def test_an_invalid_scale_is_rejected_by_layer(
    kind: str, value: float | None, unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    amax = dict(only(scales(unet, outputs=True), "conv_in").amax)
    bad = amax[f"conv_in.{kind}"].clone().reshape(-1)
    if value is None:
        bad = bad[:0]
    else:
        bad[-1] = value
    amax[f"conv_in.{kind}"] = bad
    with pytest.raises(InvalidInputError, match=r"layer 'conv_in'.*positive and finite"):
        quantized_graph(unet_graph, Quantization("int8", amax))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conv_in.weight": None}, "layer 'conv_in'.*no weight amax"),
        ({"conv_in.weight": torch.ones(5)}, "layer 'conv_in': 5 weight scales for 16 channels"),
        ({"conv_in.input": torch.ones(3)}, "layer 'conv_in'.*3 values, but one is expected"),
        ({"elsewhere.weight": torch.ones(3)}, "layer 'elsewhere': the graph has no node"),
        (
            {"class_embedding.weight": torch.ones(4), "class_embedding.output": torch.ones(())},
            "layer 'class_embedding': only layers and residual sums",
        ),
    ],
)
def test_scales_that_do_not_fit_the_graph_are_rejected_by_layer(
    change: dict[str, torch.Tensor | None],
    message: str,
    unet: Checkpoint,
    unet_graph: Graph,
    scales: Callable[..., Quantization],
) -> None:
    amax = {**only(scales(unet), "conv_in").amax, **change}
    with pytest.raises(InvalidInputError, match=message):
        quantized_graph(unet_graph, Quantization("int8", {k: v for k, v in amax.items() if v is not None}))


def test_an_unknown_format_is_rejected(unet_graph: Graph) -> None:
    with pytest.raises(InvalidInputError, match="format 'fp4'"):
        quantized_graph(unet_graph, Quantization("fp4", {}))
