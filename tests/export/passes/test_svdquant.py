"""export/passes/svdquant.py: branches keep the function; the quantized graph matches torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.config import QuantizeConfig, SmoothQuantConfig, SVDQuantConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.graph.model import Graph, load_all
from diffpress.export.passes.svdquant import svdquant
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, quantized_graph, run_exactly, with_recorded_reads

LINEAR = ["gemm", "matmul"]


def factors(checkpoint: Checkpoint, layer: str, rank: int = 3) -> dict[str, torch.Tensor]:
    out, inputs = checkpoint.model.get_parameter(f"{layer}.weight").shape
    generator = torch.Generator().manual_seed(0)
    shapes = {f"{layer}.down": (rank, inputs), f"{layer}.up": (out, rank)}
    return {key: torch.randn(*shape, generator=generator) for key, shape in shapes.items()}


@pytest.mark.parametrize("layer", LINEAR)
def test_a_layer_with_a_branch_computes_the_same_function(
    layer: str, everything: Checkpoint, everything_graph: Graph
) -> None:
    graph, inputs = svdquant(everything_graph, factors(everything, layer)), inputs_for(everything)
    assert len(graph.proto.graph.node) == len(everything_graph.proto.graph.node) + 3
    np.testing.assert_allclose(run_exactly(graph, inputs), run_exactly(everything_graph, inputs), rtol=1e-3, atol=1e-4)


SETTINGS = [{"format": "int8", "smoothquant": SmoothQuantConfig(alpha=0.5)}, {"format": "int4"}, {"format": "w4a8"}]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_quantized_graph_computes_what_torch_fake_quantization_does(
    settings: dict[str, Any], unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    config = QuantizeConfig(samples=4, batch=4, output_correction=False, svdquant=SVDQuantConfig(rank=4), **settings)
    quantized, inputs = quantize(unet, config, Context(0, tmp_path, unet)), inputs_for(unet)
    assert quantized.quantization is not None and quantized.quantization.svdquant
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    expected = TorchNetwork(fake_quantized(quantized), unet.spec).run(inputs)
    found = run_exactly(quantized_graph(unet_graph, quantized.quantization), inputs)
    assert sqnr_db(expected, found) > sqnr_db(plain, expected) + 6


def test_the_branch_reads_the_tensor_before_rounding(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    config = QuantizeConfig(
        samples=4,
        batch=4,
        output_correction=False,
        svdquant=SVDQuantConfig(rank=4),
        smoothquant=SmoothQuantConfig(alpha=0.5),
    )
    quantized = quantize(unet, config, Context(0, tmp_path, unet))
    assert quantized.quantization is not None
    graph = quantized_graph(unet_graph, quantized.quantization).proto.graph
    readers = {node.name.partition("#")[0]: node for node in graph.node}
    layer = "mid_block.attentions.0.to_q"
    old = {node.name.partition("#")[0]: node for node in unet_graph.proto.graph.node}
    assert readers[f"{layer}.svdquant_down"].input[0] == old[layer].input[0] != readers[layer].input[0]


def test_the_weight_is_read_only_when_written_and_the_graph_is_not_changed(
    everything: Checkpoint, everything_graph: Graph
) -> None:
    before = load_all(everything_graph).SerializeToString(deterministic=True)
    assert svdquant(everything_graph, {}) is everything_graph
    reads: list[str] = []
    graph = svdquant(with_recorded_reads(everything_graph, reads), factors(everything, "gemm"))
    assert reads == []
    graph.weights["gemm.weight_left"].read()
    assert len(reads) == 1
    assert load_all(everything_graph).SerializeToString(deterministic=True) == before


def test_factors_that_do_not_fit_are_rejected_by_name(everything: Checkpoint, everything_graph: Graph) -> None:
    found = factors(everything, "gemm")
    found["gemm.up"] = torch.ones(3, 3)
    with pytest.raises(InvalidInputError, match="layer 'gemm': branch does not match weight"):
        svdquant(everything_graph, found)
    with pytest.raises(InvalidInputError, match="layer 'elsewhere': the graph has no node"):
        svdquant(everything_graph, {"elsewhere.down": torch.ones(2, 8), "elsewhere.up": torch.ones(8, 2)})
