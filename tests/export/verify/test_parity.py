"""export/verify/parity.py: engines are compared with torch over a full trajectory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import numpy_helper

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.verify.parity import FAKE_QUANT, Reference, check_parity, parity_case_for, torch_reference
from diffpress.runtime.engines import available
from diffpress.runtime.errors import GateFailedError
from tests.export.oracle import quantized_graph

SAFE = 127 / 64  # weights within 7 bits


def reference_of(checkpoint: Checkpoint) -> Reference:
    return torch_reference(checkpoint, parity_case_for(checkpoint.model, checkpoint.spec))


def shifted(graph: Graph, name: str, by: float) -> Graph:
    changed = load_all(graph)
    tensor = next(tensor for tensor in changed.graph.initializer if tensor.name == name)
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) + np.float32(by), name))
    return Graph(changed)


def test_a_float_graph_samples_torchs_images_in_every_engine(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), threads=1)
    assert set(found) == set(available())
    assert all((row["samples"], row["steps"]) == (16, 4) for row in found.values())
    assert all(row["max_abs"] <= 1e-3 and row["sqnr_db"] > 80 for row in found.values())


def test_parity_measures_a_known_difference(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.export.verify.parity.MAX_ABS", np.inf)
    # the last bias affects every image, at least through the last step
    save_graph(shifted(unet_graph, "conv_out.bias", 0.01), tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1)
    row = found["onnxruntime"]
    assert 1e-3 < row["max_abs"] < 0.5 and 10 < row["sqnr_db"] < 60


def test_a_float_graph_that_deviates_fails_with_both_metrics(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    save_graph(shifted(unet_graph, "conv_out.bias", 0.01), tmp_path / "g.onnx")
    with pytest.raises(
        GateFailedError,
        match=r"g.onnx in onnxruntime: samples differ .* by up to 0\.\d+ .* dB\); the limit is 0\.001",
    ):
        check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1)


def test_a_quantized_graph_is_compared_with_fake_quantization(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    quantized = unet.evolve(quantization=scales(unet, weight_range=SAFE))
    assert quantized.quantization is not None
    save_graph(quantized_graph(unet_graph, quantized.quantization), tmp_path / "q.onnx")
    found = check_parity(tmp_path / "q.onnx", reference_of(quantized), threads=1)
    assert set(found) == {FAKE_QUANT, *available()}
    assert all(10 < row["sqnr_db"] < 80 for row in found.values())

    coarser = {name: amax * (4 if name.endswith(".input") else 1) for name, amax in quantized.quantization.amax.items()}
    wrong = quantized_graph(unet_graph, type(quantized.quantization)("int8", coarser))
    save_graph(wrong, tmp_path / "q.onnx")
    with pytest.raises(
        GateFailedError, match=r"q.onnx in onnxruntime: .* dB SQNR .* torch's fake quantization has .* dB"
    ):
        check_parity(tmp_path / "q.onnx", reference_of(quantized), engines=["onnxruntime"], threads=1)


def test_pixel_models_are_tested_under_their_own_plan_and_latent_models_on_less(unet: Checkpoint) -> None:
    trial = parity_case_for(unet.model, unet.spec)
    assert (trial.spec, trial.samples) == (unet.spec, 16)
    plan = replace(unet.spec.plan, timesteps=tuple(float(t) for t in range(70, 0, -10)))  # 70, 60, ... 10
    latent = unet.evolve(spec=replace(unet.spec, latent_factor=8, plan=plan))
    small = parity_case_for(latent.model, latent.spec)
    assert small.samples < 16 and small.within_db > trial.within_db
    assert small.spec.plan.timesteps == (70.0, 50.0, 30.0, 10.0) and small.spec.schedule == unet.spec.schedule


def test_torch_network_does_not_change_the_mode_of_the_model(everything: Checkpoint) -> None:
    network = TorchNetwork(everything.model, everything.spec)
    inputs: dict[str, np.ndarray] = {"sample": np.zeros((1, 2, 8, 8), np.float32), "timestep": np.zeros(1, np.int64)}
    everything.model.train()
    out = network.run(inputs)
    assert everything.model.training and out.dtype == np.float32 and out.shape == (1, 2, 8, 8)
    assert dict(network.inputs) == {"sample": np.float32, "timestep": np.int64}
    everything.model.eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_torch_network_computes_in_float32_with_weights_stored_in_half_precision(
    dtype: torch.dtype, unet: Checkpoint
) -> None:
    narrow, wide = unet.clone_model().to(dtype), unet.clone_model().to(dtype).float()
    x = np.random.default_rng(0).standard_normal((2, 1, 8, 8), dtype=np.float32)
    inputs: dict[str, np.ndarray] = {"sample": x, "timestep": np.array([3, 90]), "class_labels": np.array([0, 3])}
    expected = TorchNetwork(wide, unet.spec).run(inputs)
    network = TorchNetwork(narrow, unet.spec)
    for _ in range(2):
        assert np.array_equal(network.run(inputs), expected)
        assert {parameter.dtype for parameter in narrow.parameters()} == {dtype}
