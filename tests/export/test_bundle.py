"""Bundles: files, manifest, parity, reproducibility and rejected input."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from diffpress.api import export
from diffpress.compress.checkpoint import Checkpoint, Quantization, Record
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.summary import summary
from diffpress.export.verify.engine_check import check_engine, engine_check_line
from diffpress.runtime.bundle import Bundle, load_bundle, sha256
from diffpress.runtime.engines import available, load_engine, open_engine
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampler import generate
from tests.export.oracle import exported, quantized_graph

SAFE = 127 / 64


@pytest.fixture(scope="module")
def quantized(unet: Checkpoint, scales: Callable[..., Quantization]) -> Checkpoint:
    record = Record("quantize", {"format": "int8"}, 0, {"layers": 3}, "aa", "bb", seconds=12.5)
    return unet.evolve(quantization=scales(unet, weight_range=SAFE, outputs=False), history=(record,))


@pytest.fixture(scope="module")
def bundle(quantized: Checkpoint, unet_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("out") / "bundle"
    return exported(quantized, folder, ["onnx"], float_graph=unet_graph, metrics={"frechet": 1.5}, threads=1)


def test_a_bundle_is_complete_and_samples(bundle: Bundle, quantized: Checkpoint) -> None:
    assert load_bundle(bundle.path).hash == bundle.hash
    assert bundle.spec == quantized.spec
    images = generate(open_engine(bundle, "onnxruntime", 1), bundle.spec, seeds=range(2))
    assert images.shape == (2, 1, 8, 8) and np.isfinite(images).all()


def test_the_manifest_describes_the_graph(bundle: Bundle, quantized: Checkpoint) -> None:
    manifest = bundle.manifest
    denoiser = manifest["graphs"]["denoiser"]
    assert manifest["name"] == "UNet2DModel" and manifest["metrics"] == {"frechet": 1.5}
    assert denoiser["inputs"]["sample"] == {"dtype": "float32", "shape": ["batch", 1, 8, 8]}
    assert denoiser["inputs"]["class_labels"] == {"dtype": "int64", "shape": ["batch"]}
    assert list(denoiser["outputs"]) == ["out_sample"]
    assert (denoiser["precision"], denoiser["opset"]) == ("int8", 18)
    assert "conv_in" in denoiser["quantized_layers"] and denoiser["weight_only_layers"] == ["class_embedding"]
    assert denoiser["parameters"] == sum(p.numel() for p in quantized.model.parameters())
    stored = [onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(bundle.denoiser).graph.initializer]
    kinds = ("int8", "float32", "int64", "uint8")
    sizes = {kind: sum(a.nbytes for a in stored if a.dtype == kind) for kind in kinds}
    assert denoiser["bytes_by_precision"] == sizes and next(iter(denoiser["bytes_by_precision"])) == "int8"
    assert set(manifest["parity"]) >= {"torch_fake_quant", "onnxruntime"}
    assert [record["stage"] for record in manifest["history"]] == ["quantize"]
    assert "seconds" not in manifest["history"][0]


def test_the_manifest_counts_layers_that_onnxruntime_ran_in_float(bundle: Bundle, quantized: Checkpoint) -> None:
    """Without output scales, ONNX Runtime has no integer convolution."""
    (entry,) = bundle.manifest["engines"]
    promised = bundle.manifest["graphs"]["denoiser"]["quantized_layers"]
    convolutions = {n for n, layer in quantized.model.named_modules() if isinstance(layer, torch.nn.Conv2d)}
    reasons = {found["layer"]: found["reason"] for found in entry["fallbacks"]}
    assert entry["engine"] == "onnxruntime" and entry["integer_mac_share"] < 0.2
    assert convolutions <= reasons.keys() <= set(promised) and len(reasons) <= entry["float_layers"]
    assert {reasons[name] for name in convolutions} == {"no integer convolution with a float result"}
    text = next(line for line in summary(bundle) if "onnxruntime 1" in line)
    assert f"{len(reasons)} quantized layers fell back to float: " in text and text.endswith(f"{len(reasons) - 3} more")


def test_a_large_graph_is_not_run_again_for_its_precision_report(bundle: Bundle) -> None:
    entry = check_engine("onnxruntime", bundle.denoiser, bundle.spec, 2**30 + 1)
    assert entry["graph_sha256"] == sha256(bundle.denoiser)
    assert [entry[key] for key in ("integer_mac_share", "float_layers", "fallbacks")] == [None, None, None]
    assert engine_check_line(entry).endswith("integer MACs not counted")


def test_the_same_checkpoint_gives_the_same_bytes_wherever_it_is_written(
    bundle: Bundle, quantized: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    slower = quantized.evolve(history=tuple(Record(**{**vars(r), "seconds": 99.0}) for r in quantized.history))
    again = exported(
        slower, tmp_path / "elsewhere", ["onnx"], float_graph=unet_graph, metrics={"frechet": 1.5}, threads=1
    )
    assert again.hash == bundle.hash
    for name in ("manifest.json", *bundle.manifest["files"]):
        assert sha256(again.path / name) == sha256(bundle.path / name)


def test_no_path_of_this_machine_is_in_a_bundle(bundle: Bundle) -> None:
    for file in bundle.path.iterdir():
        assert str(bundle.path).encode() not in file.read_bytes()


def test_the_stored_graph_is_the_quantized_one(
    bundle: Bundle, quantized: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    assert quantized.quantization is not None
    save_graph(quantized_graph(unet_graph, quantized.quantization), tmp_path / "q.onnx")
    assert sha256(bundle.denoiser) == sha256(tmp_path / "q.onnx")


def test_a_damaged_bundle_is_rejected(quantized: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    folder = exported(quantized, tmp_path / "b", float_graph=unet_graph, threads=1).path
    content = bytearray((folder / "denoiser.onnx").read_bytes())
    content[len(content) // 2] ^= 1
    (folder / "denoiser.onnx").write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"denoiser\.onnx: does not match its sha256"):
        load_bundle(folder)


def test_a_bundle_replaces_a_bundle_and_nothing_else(quantized: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    exported(quantized, tmp_path / "b", float_graph=unet_graph, metrics={"first": 1}, threads=1)
    second = exported(quantized, tmp_path / "b", float_graph=unet_graph, metrics={"second": 2}, threads=1)
    assert second.manifest["metrics"] == {"second": 2}
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InvalidInputError, match="photos: exists and is not a bundle"):
        exported(quantized, tmp_path / "photos", float_graph=unet_graph)
    assert (tmp_path / "photos" / "cat.jpg").read_bytes() == b"cat"


def test_an_unknown_target_is_rejected_with_the_closest_name(unet: Checkpoint, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="unknown export target 'openvin': did you mean 'openvino'"):
        export(unet, tmp_path / "b", targets=["openvin"])
    with pytest.raises(InvalidInputError, match="unknown precision 'fp8': choose from fp32, fp16, bf16"):
        export(unet, tmp_path / "b", precision="fp8")
    with pytest.raises(InvalidInputError, match=r"export\.size\.1: .*, found 'wide'"):
        export(unet, tmp_path / "b", size=(8, "wide"))  # type: ignore[arg-type]


def test_an_output_that_is_no_bundle_is_rejected_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").write_bytes(b"cat")
    with pytest.raises(InvalidInputError, match="photos: exists and is not a bundle"):
        export(tmp_path / "no-such-checkpoint", tmp_path / "photos")


def test_a_failed_gate_keeps_the_bundle_and_sampling_it_warns(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The graph is that of another model."""
    other = unet.evolve(model=unet.clone_model())
    other.model.get_parameter("conv_out.bias").data += 0.1
    with pytest.raises(GateFailedError, match=r"b: parity failed: .*60 dB are required.*The bundle is kept") as caught:
        exported(other, tmp_path / "b", float_graph=unet_graph, threads=1)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["b"]
    kept = load_bundle(tmp_path / "b")
    failures = {entry["engine"]: entry for entry in kept.manifest["parity_failures"]}
    assert failures["onnxruntime"]["target"] and set(kept.manifest["parity"]) == set(available())
    assert any("parity FAILED: denoiser.onnx in onnxruntime" in line for line in summary(kept))
    with Pipeline(kept, "onnxruntime"):
        assert "failed parity with torch when it was exported: denoiser.onnx in onnxruntime" in caplog.text
    accepted = exported(other, tmp_path / "b", float_graph=unet_graph, threads=1, parity_sqnr_db=5.0)
    assert "parity_failures" not in accepted.manifest


@pytest.mark.skipif("openvino" not in available(), reason="needs openvino")
def test_an_engine_that_is_no_target_is_recorded_warned_of_and_tried_last(
    unet: Checkpoint,
    unet_graph: Graph,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def load(path: Path, name: str, *arguments: Any, **options: Any) -> Any:
        if name == "openvino":
            raise InvalidInputError("openvino cannot run it")
        return load_engine(path, name, *arguments, **options)

    monkeypatch.setattr("diffpress.export.verify.parity.load_engine", load)
    bundle = exported(unet, tmp_path / "b", ["onnx"], float_graph=unet_graph, threads=1)
    (failure,) = bundle.manifest["parity_failures"]
    assert (failure["engine"], failure["target"], failure["sqnr_db"]) == ("openvino", False, None)
    assert "openvino is not a target, so the export continues" in caplog.text
    assert open_engine(bundle, threads=1).name == "onnxruntime"
    caplog.clear()
    assert open_engine(bundle, "openvino", 1).name == "openvino" and "failed parity" in caplog.text
    with pytest.raises(GateFailedError, match=r"denoiser\.onnx in openvino: openvino cannot run it"):
        exported(unet, tmp_path / "b", ["onnx", "openvino"], float_graph=unet_graph, threads=1)


def test_a_checkpoint_without_a_quantized_layer_is_exported_in_float(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    empty = unet.evolve(quantization=Quantization("int8"))
    bundle = exported(empty, tmp_path / "b", float_graph=unet_graph, threads=1)
    assert bundle.manifest["graphs"]["denoiser"]["precision"] == "fp32"
    assert "no layer of the checkpoint is quantized" in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("openvino") is None, reason="needs openvino")
def test_target_openvino_records_precision_and_stores_no_second_copy(
    wide: Checkpoint, wide_graph: Graph, scales: Callable[..., Quantization], tmp_path: Path
) -> None:
    checkpoint = wide.evolve(quantization=scales(wide, weight_range=SAFE))
    bundle = exported(checkpoint, tmp_path / "b", ["onnx", "openvino"], float_graph=wide_graph, threads=1)
    entry, other = bundle.manifest["engines"]
    assert entry["engine"] == "openvino" and entry["graph_sha256"] == sha256(bundle.denoiser)
    assert (entry["integer_mac_share"], entry["float_layers"], entry["fallbacks"]) == (1.0, 0, [])
    assert engine_check_line(entry).endswith("integer MACs 100.0 %, 0 layers in float")
    assert other["engine"] == "onnxruntime"
    assert list(bundle.manifest["files"]) == ["denoiser.onnx"]
    assert json.loads((bundle.path / "manifest.json").read_text())["engines"] == [entry, other]
