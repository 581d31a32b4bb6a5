"""Layers that only store int8 weights compute in float32 in every engine."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Quantization
from diffpress.export.graph.model import save_graph
from diffpress.export.graph.trace import trace
from diffpress.runtime.engines import load_engine
from tests.export.oracle import quantized_graph


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_an_int8_weight_only_layer_does_not_round_its_input(engine: str, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 64, bias=False)).eval(), torch.randn(2, 16, 64)
    graph = trace(model, lambda m, feed: (m(feed["sample"]),), {"sample": x}, ["out"], {"sample": {0: "batch"}})
    amax = model.get_parameter("0.weight").detach().abs().amax(dim=1)
    save_graph(quantized_graph(graph, Quantization("int8", {"0.weight": amax})), tmp_path / "graph.onnx")
    found = load_engine(tmp_path / "graph.onnx", engine, 1).run({"sample": x.numpy()})

    scale = amax[:, None] / 127
    stored = (model.get_parameter("0.weight").detach() / scale).round() * scale
    # float32 rounding; inputs in int8 would be off by a hundredth
    np.testing.assert_allclose(found, x @ stored.T, rtol=0, atol=1e-5)
