"""A bfloat16 graph computed in float32, compared with torch using rounded weights."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import nn

from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.trace import trace
from diffpress.export.passes.bf16_to_fp32 import bf16_to_fp32
from diffpress.export.passes.half_precision import to_half
from diffpress.runtime.engines import load_engine


def test_it_computes_with_the_rounded_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.SiLU(), nn.Linear(32, 3)).eval()
    x = torch.randn(4, 8)
    graph = trace(model, lambda m, feed: (m(feed["x"]),), {"x": x}, ["out"], {"x": {0: "batch"}})
    half, _ = to_half(graph, "bf16")
    before = load_all(half).SerializeToString(deterministic=True)
    wide = bf16_to_fp32(half)
    save_graph(wide, tmp_path / "wide.onnx")
    rounded = copy.deepcopy(model).to(torch.bfloat16).float()
    with torch.no_grad():
        expected, exact = rounded(x).numpy(), model(x).numpy()
    found = load_engine(tmp_path / "wide.onnx", "onnxruntime", 1).run({"x": x.numpy()})
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)
    assert np.abs(found - exact).max() > 1e-4
    assert load_all(half).SerializeToString(deterministic=True) == before
    proto = onnx.load(tmp_path / "wide.onnx")
    assert TensorProto.BFLOAT16 not in {tensor.data_type for tensor in proto.graph.initializer}


def test_a_graph_without_bfloat16_is_unchanged(unet_graph: Graph) -> None:
    assert load_all(bf16_to_fp32(unet_graph)) == load_all(unet_graph)
