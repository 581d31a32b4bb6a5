"""export/engine_variants.py: an engine that cannot run denoiser.onnx gets a graph with fewer quantized layers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint, Quantization, Source
from diffpress.compress.config import ExportConfig
from diffpress.compress.models.widths import widths_of
from diffpress.export.bundle import export_bundle
from diffpress.export.engine_variants import layers_that_fail
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.engines.openvino import engine as openvino_engine
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

needs_openvino = pytest.mark.skipif("openvino" not in available(), reason="needs openvino")
BLOCKS = [f"blocks.{i}.{layer}" for i in range(4) for layer in ("k", "q", "v")]


def scales_for(layers: list[str]) -> Quantization:
    return Quantization("int8", {f"{layer}.weight": torch.ones(1) for layer in layers})


@pytest.mark.parametrize(
    ("bad", "found"),
    [
        ([], []),
        (["blocks.2.q"], ["blocks.2.q"]),
        (["blocks.1.k", "blocks.1.v"], ["blocks.1.k", "blocks.1.v"]),
        ([f"blocks.{i}.v" for i in range(4)], [f"blocks.{i}.v" for i in range(4)]),
    ],
)
def test_exactly_the_layers_that_fail_return_to_float(bad: list[str], found: list[str]) -> None:
    tried = []

    def failure(quantization: Quantization) -> str:
        tried.append(quantization)
        return "no" if set(bad) & set(quantization.layers) else ""

    in_float = layers_that_fail(scales_for(BLOCKS), failure)
    assert set(found) <= set(in_float) and not failure(scales_for(BLOCKS).without(in_float))
    assert len(in_float) <= max(len(found), 4) + 4 and len(tried) < 30


def test_two_layers_that_fail_only_together_cost_one_of_them() -> None:
    together = {"blocks.0.k", "blocks.3.v"}
    failure = lambda quantization: "no" if together <= set(quantization.layers) else ""  # noqa: E731
    assert layers_that_fail(scales_for(BLOCKS), failure) == ["blocks.3.v"]


def test_nothing_is_returned_if_the_float_graph_fails_as_well() -> None:
    assert layers_that_fail(scales_for(BLOCKS), lambda quantization: "never") == []


class PaddedAttention(nn.Module):
    """Linear attention as in Sana: v is padded with ones, which makes the sum of k its last row."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 16), nn.Linear(16, 4)
        self.q, self.k, self.v = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = self.first(sample.flatten(2).transpose(1, 2))
        q, k, v = (layer(x).transpose(1, 2).unflatten(1, (2, -1)) for layer in (self.q, self.k, self.v))
        v = F.pad(v, (0, 0, 0, 1), value=1.0)
        x = (v @ F.relu(k).transpose(2, 3)) @ F.relu(q)
        x = x[:, :, :-1] / (x[:, :, -1:] + 1e-15)
        return self.last(x.flatten(1, 2).transpose(1, 2)).transpose(1, 2).reshape(sample.shape)


@pytest.fixture(scope="module")
def padded_checkpoint(scales: Callable[..., Quantization]) -> Checkpoint:
    torch.manual_seed(0)
    schedule = betas_schedule("linear", 50)
    spec = DenoiserSpec("epsilon", schedule, (4, 8, 8), make_plan("ddim", 3, schedule))
    model = PaddedAttention().eval()
    checkpoint = Checkpoint(model, spec, Source("custom", original=widths_of(model)))
    return checkpoint.evolve(quantization=scales(checkpoint, weight_range=127 / 64, outputs=True))


CONFIG = ExportConfig.model_validate({"targets": ["onnx", "openvino"]})


@pytest.fixture(scope="module")
def padded(padded_checkpoint: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A bundle for an OpenVINO that reads uint8 numbers as they are written: it cannot compile the padded v."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(openvino_engine, "use_signed_integers_", lambda model: None)
        return export_bundle(padded_checkpoint, tmp_path_factory.mktemp("out") / "bundle", CONFIG)


@needs_openvino
def test_openvino_needs_no_graph_of_its_own_with_signed_integers(padded_checkpoint: Checkpoint, tmp_path: Path) -> None:
    bundle = export_bundle(padded_checkpoint, tmp_path / "bundle", CONFIG)
    assert not (bundle.path / "denoiser.openvino.onnx").exists()


@needs_openvino
def test_openvino_keeps_the_layer_that_it_cannot_compile_in_float(padded: Bundle) -> None:
    denoiser: dict[str, Any] = padded.manifest["graphs"]["denoiser"]
    entry = denoiser["variants"]["openvino"]
    assert entry["file"] == "denoiser.openvino.onnx" and entry["precision"] == "int8"
    assert "v" in denoiser["quantized_layers"]  # other engines run all of them on integers
    reports = {report["engine"]: report for report in padded.manifest["engines"]}
    assert reports["openvino"]["graph"] == entry["file"] and reports["openvino"]["integer_mac_share"] > 0.2
    reference_db = padded.manifest["parity"]["torch_fake_quant"]["sqnr_db"]
    assert entry["parity"]["sqnr_db"] > reference_db - 1 and "openvino" not in padded.manifest["parity"]


@needs_openvino
def test_the_runtime_takes_the_graph_of_the_engine(padded: Bundle) -> None:
    outputs = []
    for name in ("openvino", "onnxruntime"):
        engine = open_engine(padded, name)
        outputs.append(engine.run(dummy_inputs(engine, padded.spec, 2)))
    assert np.isfinite(outputs).all() and np.abs(outputs[0] - outputs[1]).max() < 0.1 * np.abs(outputs[1]).max()


class Activated(nn.Module):
    """Linear layers and their activations, as a small model of points has them."""

    def __init__(self, activation: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))
        self._activation = activation

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = sample.flatten(1)
        for layer in list(self.layers)[:-1]:
            x = self._activation(layer(x))
        return self.layers[-1](x).view_as(sample)


ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "mish": F.mish,
    "softplus": F.softplus,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "hardswish": F.hardswish,
    "elu": F.elu,
    "selu": F.selu,
    "celu": F.celu,
    "relu6": F.relu6,
    "leaky relu": F.leaky_relu,
    "prelu": nn.PReLU(64),
    "softmax": lambda x: F.softmax(x, -1),
    "log sigmoid": F.logsigmoid,
    "tanh": torch.tanh,
    "sine": torch.sin,
    "snake": lambda x: x + torch.sin(x) ** 2,
    "glu": lambda x: F.glu(torch.cat([x, 0.5 * x], -1)),
}


@needs_openvino
@pytest.mark.parametrize(
    "name", [name if name == "mish" else pytest.param(name, marks=pytest.mark.slow) for name in ACTIVATIONS]
)
def test_every_activation_runs_between_integer_layers_in_every_engine_and_batch(
    name: str, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    schedule = betas_schedule("linear", 50)
    spec = DenoiserSpec("epsilon", schedule, (1, 8, 8), make_plan("ddim", 3, schedule))
    model = Activated(ACTIVATIONS[name]).eval()
    checkpoint = Checkpoint(model, spec, Source("custom", original=widths_of(model)))
    checkpoint = checkpoint.evolve(quantization=scales(checkpoint, weight_range=127 / 64))
    config = ExportConfig.model_validate({"targets": ["onnx", "openvino"]})
    bundle = export_bundle(checkpoint, tmp_path / "bundle", config)  # also times batch 8
    share = {report["engine"]: report["integer_mac_share"] for report in bundle.manifest["engines"]}
    assert share["openvino"] == 1.0
    engine = open_engine(bundle, "openvino")
    for batch in (1, 3):
        assert np.isfinite(engine.run(dummy_inputs(engine, spec, batch))).all()


class Convolved(nn.Module):
    """Convolutions of one, two or three dimensions over the same values."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        kind = (nn.Conv1d, nn.Conv2d, nn.Conv3d)[rank - 1]
        self._shape = [(64,), (8, 8), (4, 4, 4)][rank - 1]
        self.first, self.last = kind(2, 16, 3, padding=1), kind(16, 2, 1)
        self.dense = kind(16, 16, 3, padding=1)
        self.depthwise = kind(16, 16, 3, padding=2, dilation=2, groups=16)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.first(sample.reshape(-1, 2, *self._shape)))
        return self.last(torch.relu(self.depthwise(torch.relu(self.dense(x))))).view_as(sample)


@needs_openvino
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions_of_any_dimension_run_on_integers_in_both_engines(
    rank: int, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    torch.manual_seed(0)
    schedule = betas_schedule("linear", 50)
    spec = DenoiserSpec("epsilon", schedule, (2, 8, 8), make_plan("ddim", 3, schedule))
    model = Convolved(rank).eval()
    checkpoint = Checkpoint(model, spec, Source("custom", original=widths_of(model)))
    checkpoint = checkpoint.evolve(quantization=scales(checkpoint, weight_range=127 / 64, outputs=True))
    bundle = export_bundle(
        checkpoint, tmp_path / "bundle", ExportConfig.model_validate({"targets": ["onnx", "openvino"]}), latencies=()
    )
    for report in bundle.manifest["engines"]:
        assert report["fallbacks"] == [] and report["integer_mac_share"] > 0.8
