"""Formats that each engine supports: the table, TensorRT's builder, and the messages to users."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import onnx
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.formats import FORMATS
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.summary import summary
from diffpress.export.targets.capability import SUPPORT, check_supported, emulated, expected_integer_layers
from diffpress.export.targets.precision import precision_of
from diffpress.export.targets.tensorrt import build_engine
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import exported, measured_scales, quantized_graph

needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")

ABLE = [("int8", "8.6"), ("int8", "8.9"), ("int8", "12.0"), ("fp8", "8.9"), ("fp8", "12.0")]
ABLE += [("w4a8", "8.6"), ("int4", "8.6"), ("int4", "12.0"), ("nvfp4", "12.0")]


def calibrated(checkpoint: Checkpoint, kind: str, weight_range: float = 1.0) -> Quantization:
    """Return scales of every layer in `kind`, and of sensitive linear layers as int8 weights."""
    formats = {}
    sensitive = set(adapter_for(checkpoint.model).sensitive_layers(checkpoint.model))
    for name, layer in checkpoint.model.named_modules():
        if isinstance(layer, nn.Linear):
            formats[name] = "int8_weight_only" if name in sensitive else kind
        elif isinstance(layer, nn.Conv2d) and name not in sensitive:
            formats[name] = "fp8" if kind == "nvfp4" else kind
    return measured_scales(checkpoint, kind=kind, formats=formats, outputs=True, weight_range=weight_range)


def test_the_table_lists_every_format() -> None:
    assert set(SUPPORT) == set(FORMATS)


def test_a_gpu_that_cannot_run_a_format_is_rejected_with_the_formats_it_can_run() -> None:
    check_supported(["fp8", "int8"], ["8.9", "12.0"])
    check_supported(["int8", "int4", "w4a8", "int8_weight_only"], ["7.5", "8.6"])
    message = "capability 8.6 does not run format fp8; 8.9 and later do, and 8.6 runs int8, w4a8"
    with pytest.raises(InvalidInputError, match=message) as caught:
        check_supported(["int8", "fp8"], ["8.9", "8.6"])
    assert "\n" not in str(caught.value)
    with pytest.raises(InvalidInputError, match=r"9\.0 does not run format nvfp4; 12\.0 and later do"):
        check_supported(["nvfp4"], ["9.0"])  # 9.0 < 12.0 as numbers, not as strings


def test_formats_that_the_cpu_emulates_are_not_expected_on_integers() -> None:
    assert emulated(["int8", "fp8", "int8_weight_only"]) == ["fp8"]
    amax = dict.fromkeys(("a.weight", "a.input", "b.weight", "b.input", "c.weight"), torch.ones(()))
    mixed = Quantization("int8", amax, {"b": "fp8"})
    assert expected_integer_layers(mixed) == ["a"]


def test_fp8_on_a_gpu_without_it_is_rejected_before_any_work(
    unet: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.export.bundle.check_build", lambda *_: None)
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: pytest.fail("traced before the check"))
    checkpoint = unet.evolve(quantization=calibrated(unet, "fp8"))
    with pytest.raises(InvalidInputError, match=r"8\.6 does not run format fp8"):
        exported(checkpoint, tmp_path / "b", ["tensorrt"], capabilities=["8.6"])
    assert list(tmp_path.iterdir()) == []


def test_exporting_an_fp8_bundle_reports_what_runs_in_float(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint = unet.evolve(quantization=calibrated(unet, "fp8"))
    bundle = exported(checkpoint, tmp_path / "b", float_graph=unet_graph, threads=1)
    message = "fp8: engines on the CPU round to it and compute in float, no faster than fp32; TensorRT multiplies in it"
    assert caplog.text.count(message) == 1
    denoiser = bundle.manifest["graphs"]["denoiser"]
    assert (denoiser["precision"], denoiser["opset"]) == ("fp8", 19) and denoiser["formats"]["fp8"] > 20
    (entry,) = bundle.manifest["engines"]
    assert entry["emulated"] == ["fp8"] and entry["fallbacks"] == [] and entry["integer_mac_share"] == 0
    assert any("computes fp8 in float, no faster than fp32" in line for line in summary(bundle))


def test_exporting_an_nvfp4_bundle_reports_that_only_weights_have_4_bits(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantization = calibrated(unet, "nvfp4")
    bundle = exported(unet.evolve(quantization=quantization), tmp_path / "b", float_graph=unet_graph, threads=1)
    (message,) = [line for line in caplog.messages if "nvfp4" in line]
    assert (
        "nvfp4: engines on the CPU read weights from 4 bits and compute in float" in message
        and "from compute" in message
    )
    (entry,) = bundle.manifest["engines"]
    assert entry["emulated"] == ["fp8", "nvfp4"] and entry["integer_mac_share"] == 0 == len(entry["fallbacks"])


def test_a_bundle_in_four_bits_runs_on_integers(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantization = calibrated(unet, "w4a8")
    bundle = exported(unet.evolve(quantization=quantization), tmp_path / "b", float_graph=unet_graph, threads=1)
    denoiser, (entry,) = bundle.manifest["graphs"]["denoiser"], bundle.manifest["engines"]
    assert denoiser["precision"] == "w4a8" and entry["emulated"] == [] and entry["integer_mac_share"] > 0.9
    assert "in float" not in caplog.text
    assert denoiser["bytes_by_precision"]["int4"] > denoiser["bytes_by_precision"]["int8"]
    assert entry["fallbacks"] == []


def test_the_label_names_all_formats_that_compute() -> None:
    amax = {f"{name}.weight": torch.ones(()) for name in "abcd"}
    assert precision_of(Quantization("int8", amax, {"d": "fp8"})) == "int8+fp8"
    assert precision_of(Quantization("int8", amax, dict.fromkeys("abc", "int8_weight_only"))) == "int8"
    assert precision_of(Quantization("int8_weight_only", amax)) == "int8_weight_only"
    assert precision_of(None) == "fp32"


@needs_tensorrt
@pytest.mark.parametrize(("kind", "capability"), ABLE)
def test_tensorrt_builds_the_graph_of_each_format(
    kind: str, capability: str, unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    save_graph(quantized_graph(unet_graph, calibrated(unet, kind), tensorrt=True), tmp_path / "g.onnx")
    entry = build_engine(tmp_path / "g.onnx", tmp_path, [capability], unet.spec)
    assert (tmp_path / entry["file"]).stat().st_size > 100_000


@needs_tensorrt
def test_tensorrts_builder_rejects_fp8_where_the_table_does(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    save_graph(quantized_graph(unet_graph, calibrated(unet, "fp8"), tensorrt=True), tmp_path / "g.onnx")
    with pytest.raises(InvalidInputError, match="fp8") as caught:
        build_engine(tmp_path / "g.onnx", tmp_path, ["8.6"], unet.spec)
    assert "\n" not in str(caught.value)


@needs_tensorrt
def test_the_bundle_contains_the_graph_its_engine_was_built_from(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    quantization = calibrated(unet, "int8", weight_range=127 / 64)
    bundle = exported(
        unet.evolve(quantization=quantization),
        tmp_path / "b",
        ["tensorrt"],
        capabilities=["8.9"],
        float_graph=unet_graph,
        threads=1,
    )
    entry = next(entry for entry in bundle.manifest["engines"] if entry["engine"] == "tensorrt")
    assert entry["graph"] == "denoiser.tensorrt.onnx" and entry["graph_sha256"] == sha256(bundle.path / entry["graph"])
    zeros = {t.name for t in onnx.load(bundle.path / entry["graph"]).graph.initializer}
    assert "int8_zero" in zeros and "uint8_zero" not in zeros
