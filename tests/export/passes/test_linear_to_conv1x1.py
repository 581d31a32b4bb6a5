"""export/passes/linear_to_conv1x1.py: linear layers over sequences become equivalent 1x1 convolutions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.trace import trace
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.passes.linear_to_conv1x1 import linear_to_conv1x1
from diffpress.runtime.engines import available, load_engine
from tests.export.oracle import run_exactly


class Tokens(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.plain, self.unbiased = nn.Linear(6, 10), nn.Linear(10, 6, bias=False)
        self.twice, self.grid, self.flat = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        x = self.unbiased(torch.tanh(self.plain(sample)))
        x = self.twice(torch.tanh(self.twice(x)))
        x = self.grid(x[:, :, None, :])[:, :, 0]  # four dimensions
        return x + self.flat(x.mean(1)).mean(1)[:, None, None]  # two


LAYERS = ("plain", "unbiased", "twice", "grid", "flat")


@pytest.fixture(scope="module")
def graph() -> Graph:
    torch.manual_seed(0)
    axes = {"sample": {0: "batch", 1: "sequence"}}
    forward = lambda model, feed: model(feed["sample"])  # noqa: E731
    return trace(Tokens().eval(), forward, {"sample": torch.randn(2, 5, 6)}, ["out"], axes)


def run(graph: Graph, sample: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(load_all(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {"sample": sample})[0]


@pytest.mark.parametrize("shape", [(2, 5, 6), (1, 1, 6), (3, 9, 6)])
def test_the_convolutions_compute_the_same_as_the_products(shape: tuple[int, int, int], graph: Graph) -> None:
    sample = np.random.default_rng(0).standard_normal(shape, dtype=np.float32)
    np.testing.assert_allclose(run(linear_to_conv1x1(graph, LAYERS), sample), run(graph, sample), rtol=0, atol=1e-6)


def test_layers_over_sequences_become_convolutions_of_the_same_names_and_others_stay(graph: Graph) -> None:
    made = linear_to_conv1x1(graph, LAYERS).proto.graph
    convolutions = {node.name for node in made.node if node.op_type == "Conv"}
    assert convolutions == {"plain", "unbiased", "twice", "twice#2"}
    assert {node.name for node in made.node if node.op_type in ("MatMul", "Gemm")} == {"grid", "flat"}
    # their biases moved in; the remaining one belongs to the layer over four dimensions
    assert Counter(len(node.input) for node in made.node if node.op_type == "Conv") == {3: 3, 2: 1}
    stored = [tensor.name for tensor in made.initializer]
    assert len(stored) == len(set(stored)) and "plain.weight" not in stored


def test_only_the_requested_layers_change_and_the_input_graph_does_not(graph: Graph) -> None:
    before = graph.proto.SerializeToString(deterministic=True)
    made = linear_to_conv1x1(graph, ("unbiased",)).proto.graph
    assert [node.name for node in made.node if node.op_type == "Conv"] == ["unbiased"]
    assert graph.proto.SerializeToString(deterministic=True) == before


def test_a_bias_stays_outside_if_the_product_before_it_has_other_readers() -> None:
    class Read(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.bias = nn.Linear(6, 6, bias=False), nn.Parameter(torch.ones(6))

        def forward(self, sample: torch.Tensor) -> torch.Tensor:
            x = self.layer(sample)
            return (x + self.bias) * x

    torch.manual_seed(0)
    sample = torch.randn(2, 5, 6)
    graph = trace(Read().eval(), lambda model, feed: model(feed["sample"]), {"sample": sample}, ["out"], {})
    made = linear_to_conv1x1(graph, ("layer",))
    assert "Add" in {node.op_type for node in made.proto.graph.node}
    np.testing.assert_allclose(run(made, sample.numpy()), run(graph, sample.numpy()), rtol=0, atol=1e-6)


class Projection(nn.Module):
    """Image [B, 16, 8, 8] -> tokens -> linear layer -> `used(self, tokens, image)`."""

    def __init__(self, used: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.linear, self.conv, self._used = nn.Linear(16, 16), nn.Conv2d(16, 4, 3, padding=1), used
        self.same = nn.Conv2d(16, 16, 3, padding=1)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self._used(self, self.linear(sample.flatten(2).transpose(1, 2)), sample)


def to_image(x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).reshape(-1, 16, 8, 8)


USES: dict[str, Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "tokens": lambda m, x, image: 1.5 * x,
    "transposed": lambda m, x, image: 1.5 * x.transpose(1, 2),
    "image": lambda m, x, image: to_image(x),
    "convolved": lambda m, x, image: m.conv(to_image(x)),
    "activation, then transposed": lambda m, x, image: 1.5 * torch.relu(x).transpose(1, 2),
    "added to tokens, then transposed": lambda m, x, image: 1.5 * (x + image.flatten(2).mT).transpose(1, 2),
    "added to tokens, then to an image": lambda m, x, image: m.conv(to_image(x + image.flatten(2).mT) + m.same(image)),
    "added to the input": lambda m, x, image: m.conv(to_image(x) + image),
    "added to a convolution": lambda m, x, image: m.conv(to_image(x) + (image + m.same(image)) / 1.4),
    "added to an activation": lambda m, x, image: m.conv(to_image(x) + torch.relu(m.same(image))),
    "scaled image": lambda m, x, image: to_image(x) * image,
    "concatenated image": lambda m, x, image: torch.cat([to_image(x), image], 1),
    "heads": lambda m, x, image: 1.5 * x.transpose(1, 2).unflatten(1, (2, 8)).transpose(2, 3),
    "linear attention": lambda m, x, image: (x.transpose(1, 2) @ torch.relu(x)) @ x.transpose(1, 2),
}


@pytest.mark.skipif("openvino" not in available(), reason="needs openvino")
@pytest.mark.parametrize("rounded", ["rounded", "float"])
@pytest.mark.parametrize("use", USES)
def test_openvino_computes_the_same_whatever_reads_the_layer(use: str, rounded: str, tmp_path: Path) -> None:
    """OpenVINO 2026.4 drops a transposition that follows the one of the convolution, and permutes the values."""
    torch.manual_seed(0)
    sample = torch.randn(2, 16, 8, 8)
    inputs = {"sample": sample.numpy()}
    traced = trace(Projection(USES[use]).eval(), lambda m, f: m(f["sample"]), {"sample": sample}, ["out"], {})
    graph = linear_to_conv1x1(traced, ("linear",), ("linear",) if rounded == "rounded" else ())
    amax = {"linear.weight": torch.full((16,), 0.5), "linear.input": torch.tensor(4.0)}
    exact = [run_exactly(insert_qdq(graph, Quantization("int8", amax)), inputs)]
    if rounded == "rounded":
        amax["linear.output"] = torch.tensor(3.0)
        exact.append(run_exactly(insert_qdq(graph, Quantization("int8", amax)), inputs))
    save_graph(insert_qdq(graph, Quantization("int8", amax)), tmp_path / "graph.onnx")
    with closing(load_engine(tmp_path / "graph.onnx", "openvino", 1)) as engine:
        found = engine.run(inputs)
    # the engine adds values before they are rounded (runtime/engines/openvino/residual_sums.py)
    assert max(sqnr_db(expected, found) for expected in exact[-2 if use.startswith("added") else -1 :]) > 90
