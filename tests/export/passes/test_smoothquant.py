"""export/passes/smoothquant.py: smoothing keeps the function; the quantized graph matches torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.config import QuantizeConfig, SmoothQuantConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.passes.linear_to_conv1x1 import ENTRY
from diffpress.export.passes.smoothquant import apply_smoothquant
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, quantized_graph, run_exactly, with_recorded_reads

SMOOTHED = ["twin_a", "down", "up", "gemm", "matmul", "unbiased", "twice"]


def vectors(checkpoint: Checkpoint, layers: list[str]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name in layers:
        transposed = isinstance(checkpoint.model.get_submodule(name), torch.nn.ConvTranspose2d)
        channels = checkpoint.model.get_parameter(f"{name}.weight").shape[0 if transposed else 1]
        found[name] = torch.exp2(4 * torch.rand(channels, generator=generator) - 2)
    return found


@pytest.fixture(scope="module")
def quantized(unet: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The U-Net with smoothed linear layers and concatenations."""
    config = QuantizeConfig(
        samples=4, batch=4, smoothquant=SmoothQuantConfig(alpha=0.5), split_concats=True, output_correction=False
    )
    return quantize(unet, config, Context(0, tmp_path_factory.mktemp("work"), unet))


@pytest.mark.parametrize("layer", SMOOTHED)
def test_a_smoothed_layer_computes_the_same_function(
    layer: str, everything: Checkpoint, everything_graph: Graph
) -> None:
    graph = apply_smoothquant(everything_graph, vectors(everything, [layer]))
    assert sum(node.op_type == "Mul" and node.name.startswith(layer) for node in graph.proto.graph.node) >= 1
    inputs = inputs_for(everything)
    plain, found = run_exactly(everything_graph, inputs), run_exactly(graph, inputs)
    np.testing.assert_allclose(found, plain, rtol=1e-4, atol=1e-5)


def test_the_quantized_graph_computes_what_torch_fake_quantization_does(
    quantized: Checkpoint, unet: Checkpoint, unet_graph: Graph
) -> None:
    inputs = inputs_for(unet)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    expected = TorchNetwork(fake_quantized(quantized), unet.spec).run(inputs)
    assert quantized.quantization is not None
    found = run_exactly(quantized_graph(unet_graph, quantized.quantization), inputs)
    assert sqnr_db(expected, found) > sqnr_db(plain, expected) + 6
    without = quantized_graph(
        unet_graph, Quantization("int8", quantized.quantization.amax, quantized.quantization.formats)
    )
    assert sqnr_db(expected, run_exactly(without, inputs)) < sqnr_db(
        plain, expected
    )  # amax is that of the smoothed tensors


@pytest.mark.parametrize("engine", available())
def test_engines_reach_the_sqnr_of_fake_quantization(
    engine: str, quantized: Checkpoint, unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    inputs = inputs_for(unet)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    fake = TorchNetwork(fake_quantized(quantized), unet.spec).run(inputs)
    assert quantized.quantization is not None
    save_graph(quantized_graph(unet_graph, quantized.quantization), tmp_path / "q.onnx")
    found = load_engine(tmp_path / "q.onnx", engine, threads=1).run(inputs)
    assert sqnr_db(plain, found) > sqnr_db(plain, fake) - 1.0


def test_readers_of_one_tensor_share_the_factor_and_the_rounding(quantized: Checkpoint, unet_graph: Graph) -> None:
    assert quantized.quantization is not None
    graph = quantized_graph(unet_graph, quantized.quantization).proto.graph
    makers = {output: node for node in graph.node for output in node.output}
    readers = {node.name: node for node in graph.node}
    q, k, v = (readers[f"{ENTRY}mid_block.attentions.0.to_{x}"].input[0] for x in "qkv")
    assert q == k == v
    rounded = makers[makers[q].input[0]]
    assert rounded.op_type == "QuantizeLinear" and makers[rounded.input[0]].op_type == "Mul"


def test_a_weight_is_multiplied_only_when_it_is_read(everything: Checkpoint, everything_graph: Graph) -> None:
    reads: list[str] = []
    graph = apply_smoothquant(with_recorded_reads(everything_graph, reads), vectors(everything, SMOOTHED))
    assert reads == []
    graph.weights["down.weight_smoothed"].read()
    assert reads == ["down.weight"]


def test_the_graph_is_not_changed(everything: Checkpoint, everything_graph: Graph) -> None:
    before = load_all(everything_graph).SerializeToString(deterministic=True)
    assert apply_smoothquant(everything_graph, {}) is everything_graph
    apply_smoothquant(everything_graph, vectors(everything, SMOOTHED))
    assert load_all(everything_graph).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize("bad", [torch.ones(5), torch.zeros(8), torch.full((8,), torch.inf), -torch.ones(8)])
def test_a_vector_that_does_not_fit_is_rejected_by_name(bad: torch.Tensor, everything_graph: Graph) -> None:
    with pytest.raises(InvalidInputError, match="layer 'twin_a': its smoothing factors must be 8 positive numbers"):
        apply_smoothquant(everything_graph, {"twin_a": bad})


def test_a_layer_that_the_graph_does_not_have_is_rejected(everything_graph: Graph) -> None:
    with pytest.raises(InvalidInputError, match="layer 'elsewhere': the graph has no node"):
        apply_smoothquant(everything_graph, {"elsewhere": torch.ones(8)})
