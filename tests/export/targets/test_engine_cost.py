"""export/targets/engine_cost.py: a layer's gain is measured on its own kernels, however they are named."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.pruning.config import PruneConfig, PruneLowRankConfig
from diffpress.compress.pruning.prune import prune
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.targets.engine_cost import layer_times, open_engine_costs
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.engines.onnxruntime.engine import OnnxRuntimeEngine
from diffpress.runtime.engines.precision_report import Kernel
from diffpress.runtime.network_inputs import dummy_inputs
from tests.export.oracle import quantized_graph


def test_kernels_belong_to_layers_by_node_tensor_bias_and_rounding(everything_graph: Graph) -> None:
    graph = everything_graph
    tensor = next(node.output[0] for node in graph.proto.graph.node if node.name == "first")
    bias = next(node.name for node in graph.proto.graph.node if node.op_type == "Add" and "matmul.bias" in node.input)
    kernels = [
        Kernel((tensor,), 1.0),  # a blocked convolution is named after its output
        Kernel(("twin_a", "node_tanh"), 2.0),
        Kernel(("twice#2",), 3.0),
        Kernel(("twice",), 4.0),
        Kernel((bias,), 5.0),
        Kernel(("last.input/Q",), 6.0),
        Kernel(("last.input/Q", "node_tanh_1"), 100.0),  # mostly the time of tanh
        Kernel(("node_tanh_2",), 100.0),
    ]
    expected = {"first": 1.0, "twin_a": 2.0, "twice": 7.0, "matmul": 5.0, "last": 6.0}
    assert layer_times(kernels, graph) == expected


@pytest.mark.parametrize("engine", available())
def test_every_layer_that_multiplies_is_found_in_the_profile(
    engine: str, unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    quantization = scales(unet, weight_range=127 / 64, outputs=True)
    heavy = [layer for layer in quantization.layers if ".conv" in layer or ".to_" in layer]
    for name, graph in (("float", unet_graph), ("int8", quantized_graph(unet_graph, quantization))):
        save_graph(graph, tmp_path / f"{name}.onnx")
        opened = load_engine(tmp_path / f"{name}.onnx", engine, 1)
        found = layer_times(opened.kernel_times(dummy_inputs(opened, unet.spec, 2), 1), graph)
        assert set(heavy) <= found.keys() and all(found[layer] > 0 for layer in heavy), (name, heavy)


def test_costs_are_those_of_the_given_quantization(wide: Checkpoint, scales: Callable[..., Quantization]) -> None:
    quantization = scales(wide, weight_range=127 / 64, outputs=True)
    with open_engine_costs(wide, "onnxruntime") as costs:
        gains = costs.gains_ms(quantization)
        assert set(gains) == set(quantization.layers) and gains["heavy"] != 0.0
        full, partial = costs.size_mib(quantization), costs.size_mib(quantization.without(["heavy"]))
        assert partial - full == pytest.approx(160 * 160 * 9 * 3 / 2**20, rel=0.02)
        assert 0.02 < costs.latency_ratio(quantization) < 20
        with costs.network(None) as exact, costs.network(quantization) as rounded:
            assert isinstance(exact, OnnxRuntimeEngine) and isinstance(rounded, OnnxRuntimeEngine)
            inputs = dummy_inputs(exact, wide.spec, 2)
            assert exact.integer_mac_share(inputs) == 0.0 and rounded.integer_mac_share(inputs) > 0.9


@pytest.mark.parametrize("engine", available())
def test_a_pruned_network_is_timed_against_the_whole_one(
    engine: str, wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = prune(wide, PruneConfig(method="magnitude", ratio=0.5), Context(0, tmp_path, wide))
    outputs: list[np.ndarray] = []

    def timed(engines: Sequence[Any], inputs: dict[str, np.ndarray]) -> list[float]:
        outputs.extend(opened.run(inputs) for opened in engines)
        outputs.extend(TorchNetwork(one.model, one.spec).run(inputs) for one in (wide, small))
        return [4.0, 3.0]

    monkeypatch.setattr("diffpress.export.targets.engine_cost.alternating_latency_ms", timed)
    with open_engine_costs(wide, engine) as costs:
        assert costs.relative_latency(small) == 0.75
    # what was timed are the two networks
    for found, expected in zip(outputs[:2], outputs[2:], strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-4)
    assert np.abs(outputs[0] - outputs[1]).max() > 0.01


class Activated(nn.Module):
    """Convolutions and a linear layer, each with an activation that an engine may fuse with it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.inner, self.relu = (nn.Conv2d(a, 64, 3, padding=1) for a in (1, 64, 64))
        self.dense, self.last = nn.Linear(64, 64), nn.Conv2d(64, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.relu(torch.tanh(self.inner(torch.tanh(self.first(sample))))))
        return self.last(torch.tanh(self.dense(x.movedim(1, -1))).movedim(-1, 1))


@pytest.mark.parametrize("engine", available())
def test_the_layers_of_two_networks_are_profiled_in_alternation(
    engine: str, wide: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = wide.evolve(model=Activated().eval())
    config = PruneLowRankConfig(ratio=0.75)
    small = prune(whole, config, Context(0, tmp_path, whole))
    order: list[int] = []
    found = OnnxRuntimeEngine.kernel_times

    def noted(opened: OnnxRuntimeEngine, *args: Any) -> list[Kernel]:
        order.append(id(opened))
        return found(opened, *args)

    monkeypatch.setattr(OnnxRuntimeEngine, "kernel_times", noted)
    with open_engine_costs(whole, engine) as costs:
        before, after = costs.layer_times_ms(small)
    assert set(before) == {"first", "inner", "relu", "dense", "last"}
    factors = {f"{name}.{factor}" for name in ("inner", "relu", "dense") for factor in ("down", "up")}
    assert set(after) == {"first", *factors, "last"}
    assert all(ms > 0 for ms in (*before.values(), *after.values()))
    if engine == "onnxruntime":
        assert len(order) == 6 and order[::2] == [order[0]] * 3 and order[1::2] == [order[1]] * 3
        assert order[0] != order[1]
