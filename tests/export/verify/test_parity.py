"""export/verify/parity.py: engines are compared with torch over a full trajectory."""

from __future__ import annotations

import re
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
from diffpress.export.verify.gate import ParityGate
from diffpress.export.verify.parity import FAKE_QUANT, check_parity
from diffpress.export.verify.reference import Reference, parity_case_for, torch_reference
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
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
    assert set(found.rows) == set(available()) and not found.failures
    assert all((row["samples"], row["steps"]) == (16, 4) for row in found.rows.values())
    assert all(row["max_abs"] <= 1e-3 and row["sqnr_db"] > 80 for row in found.rows.values())


def test_a_float_graph_that_deviates_fails_with_both_metrics_and_names_the_lever(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    # the last bias affects every image, at least through the last step
    save_graph(shifted(unet_graph, "conv_out.bias", 0.01), tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1)
    row, (failure,) = found.rows["onnxruntime"], found.failures
    assert 1e-3 < row["max_abs"] < 0.5 and 10 < row["sqnr_db"] < 60
    assert (failure.graph, failure.engine, failure.target, failure.required_db) == ("g.onnx", "onnxruntime", True, 60.0)
    assert failure.sqnr_db is not None and failure.sqnr_db <= row["sqnr_db"]
    assert "g.onnx in onnxruntime: " in failure.message and "60 dB are required in every sample" in failure.message
    accepted = f"--parity-sqnr-db {int(failure.sqnr_db)} (in a recipe gates.parity_sqnr_db)"
    assert accepted in failure.message and "\n" not in failure.message


def test_one_wrong_sample_of_sixteen_fails_a_float_graph(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx")
    reference = reference_of(unet)
    reference.exact[3] += 0.1
    found = check_parity(tmp_path / "g.onnx", reference, engines=["onnxruntime"], threads=1)
    assert found.rows["onnxruntime"]["sqnr_db"] > 60 and found.failures[0].sqnr_db < 40  # type: ignore[operator]


def test_a_difference_of_a_single_pixel_passes_by_its_sqnr(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    save_graph(unet_graph, tmp_path / "g.onnx")
    reference = reference_of(unet)
    reference.exact[0, 0, 0, 0] += 0.0016
    found = check_parity(tmp_path / "g.onnx", reference, engines=["onnxruntime"], threads=1)
    assert not found.failures and found.rows["onnxruntime"]["max_abs"] == pytest.approx(0.0016, rel=0.1)


@pytest.mark.parametrize(("bound", "passes"), [(20.0, True), (199.0, False)])
def test_an_override_replaces_the_built_in_bound_in_both_directions(
    bound: float, passes: bool, unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    graph = shifted(unet_graph, "conv_out.bias", 0.01) if passes else unet_graph
    save_graph(graph, tmp_path / "g.onnx")
    gate = ParityGate(sqnr_db=bound)
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1, gate=gate)
    assert [failure.required_db for failure in found.failures] == ([] if passes else [bound])
    assert passes or "199 dB are required by parity_sqnr_db" in found.failures[0].message


def test_a_quantized_graph_is_compared_with_fake_quantization(
    unet: Checkpoint, unet_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    quantized = unet.evolve(quantization=scales(unet, weight_range=SAFE))
    assert quantized.quantization is not None
    save_graph(quantized_graph(unet_graph, quantized.quantization), tmp_path / "q.onnx")
    found = check_parity(tmp_path / "q.onnx", reference_of(quantized), threads=1)
    assert set(found.rows) == {FAKE_QUANT, *available()} and not found.failures
    assert all(10 < row["sqnr_db"] < 80 for row in found.rows.values())

    coarser = {name: amax * (4 if name.endswith(".input") else 1) for name, amax in quantized.quantization.amax.items()}
    wrong = quantized_graph(unet_graph, type(quantized.quantization)("int8", coarser))
    save_graph(wrong, tmp_path / "q.onnx")
    found = check_parity(tmp_path / "q.onnx", reference_of(quantized), engines=["onnxruntime"], threads=1)
    assert re.search(
        r"dB SQNR .* because torch's fake quantization has .* dB; .*ignored_layers", found.failures[0].message
    )


def test_samples_that_are_not_finite_name_the_side_and_the_step(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    save_graph(shifted(unet_graph, "conv_out.bias", float("nan")), tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1)
    (failure,), first = found.failures, unet.spec.plan.timesteps[0]
    assert not found.rows and failure.sqnr_db is None
    assert failure.message == (
        f"g.onnx in onnxruntime: the engine gives NaN at step 1 of 4 (timestep {first:g}), "
        "where torch's samples are finite"
    )
    broken = unet.evolve(model=unet.clone_model())
    broken.model.get_parameter("conv_out.bias").data.fill_(float("nan"))
    (failure,) = check_parity(tmp_path / "g.onnx", reference_of(broken), threads=1).failures
    assert failure.engine == "torch" and failure.target
    assert "torch's float model gives" in failure.message and "at step 1 of 4" in failure.message


def test_an_engine_that_is_not_a_target_does_not_fail_the_gate(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(path: Path, name: str, *arguments: object, **options: object) -> object:
        if name == "other":
            raise InvalidInputError(f"{path}: other cannot run it")
        return load_engine(path, name, 1)

    monkeypatch.setattr("diffpress.export.verify.parity.load_engine", load)
    save_graph(unet_graph, tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["other", "onnxruntime"])
    (failure,) = found.failures
    assert (failure.engine, failure.target, set(found.rows)) == ("other", False, {"onnxruntime"})
    alone = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["other"])
    assert alone.failures[0].target  # nothing else has verified the graph


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
