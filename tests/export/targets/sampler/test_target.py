"""Target sampler of an export: files, manifest, verification, and what is refused before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import ExportConfig
from diffpress.compress.workspace import Workspace
from diffpress.export import run_bundles
from diffpress.export.graph.model import Graph
from diffpress.export.run_bundles import baseline_bundle
from diffpress.export.summary import summary
from diffpress.export.targets.sampler import verify
from diffpress.export.targets.sampler.verify import verify_sampler
from diffpress.runtime.bundle import Bundle, load_bundle, sha256
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from diffpress.runtime.sampling_plan import OutputCorrection, make_plan
from tests.export.oracle import exported
from tests.export.targets.sampler.unsealed import stored_arrays, stored_bytes, written_sampler


@pytest.fixture(scope="module")
def quantized(unet: Checkpoint, scales: Callable[..., Quantization]) -> Checkpoint:
    """An int8 checkpoint with guidance and output corrections."""
    corrections = tuple(OutputCorrection(0.01 * index, (0.02,)) for index in range(4))
    plan = replace(unet.spec.plan, guidance=1.5, output_corrections=corrections)
    return unet.evolve(spec=unet.spec.with_plan(plan), quantization=scales(unet, outputs=True))


@pytest.fixture(scope="module")
def bundle(quantized: Checkpoint, unet_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("out") / "bundle"
    return exported(quantized, folder, ["sampler"], float_graph=unet_graph, threads=1, parity_sqnr_db=0.0)


def test_an_int8_bundle_has_a_verified_sampler(bundle: Bundle) -> None:
    entry, files = bundle.manifest["sampler"], bundle.manifest["files"]
    assert load_bundle(bundle.path).hash == bundle.hash and {"sampler.onnx", "sampler.json"} <= files.keys()
    assert entry["bytes"] == files["sampler.onnx"]["bytes"] and bundle.manifest["graphs"]["denoiser"]["formats"]
    assert (entry["parity"]["samples"], entry["parity"]["steps"]) == (2, 4)
    assert entry["parity"]["sqnr_db"] >= 40.0
    (line,) = (line for line in summary(bundle) if "against the runtime" in line)
    assert "sampler.onnx" in line and f"{entry['parity']['sqnr_db']:.1f} dB" in line


def test_integer_weights_are_stored_once_and_no_path_is_stored(bundle: Bundle) -> None:
    stored, denoiser = (stored_bytes(bundle.path / file) for file in ("sampler.onnx", "denoiser.onnx"))
    assert denoiser <= stored < denoiser + 2000
    arrays = stored_arrays(bundle.path / "sampler.onnx")
    assert {array.dtype.name for array in arrays["step"]} >= {"int8", "float32"}
    assert sum(array.nbytes for array in arrays["sampler"]) < 100
    assert str(bundle.path).encode() not in (bundle.path / "sampler.onnx").read_bytes()


def test_the_same_bundle_gives_the_same_bytes(bundle: Bundle) -> None:
    assert sha256(written_sampler(bundle, "again.onnx")) == sha256(bundle.path / "sampler.onnx")
    (bundle.path / "again.onnx").unlink()


def test_the_description_says_what_to_feed(bundle: Bundle) -> None:
    description = json.loads((bundle.path / "sampler.json").read_text())
    assert list(description["inputs"]) == ["noise", "labels", "guidance"]
    assert description["inputs"]["noise"]["shape"] == ["batch", 1, 8, 8]
    assert description["inputs"]["labels"] == {"dtype": "int64", "shape": ["batch"], "classes": 4}
    assert description["inputs"]["guidance"] == {"dtype": "float32", "shape": [], "default": 1.5}
    images = {"dtype": "float32", "shape": ["batch", 8, 8, 1], "layout": "NHWC", "range": [0.0, 1.0]}
    assert description["outputs"] == {"images": images}
    assert description["sampling"]["steps"] == 4 and description["file"] == "sampler.onnx"


def test_a_sampler_of_another_plan_fails_verification(bundle: Bundle) -> None:
    assert verify_sampler(bundle, "sampler.onnx", 1)[1] == ()
    other = replace(bundle, spec=bundle.spec.with_plan(make_plan("ddim", 2, bundle.spec.schedule)))
    row, (failure,) = verify_sampler(other, "sampler.onnx", 1)
    assert row["sqnr_db"] < 40.0 and failure.target and failure.sqnr_db == row["sqnr_db"]
    assert "40 dB is required" in failure.message


def test_a_failed_verification_keeps_the_bundle_and_fails_the_export(
    unet: Checkpoint, unet_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "MAX_ABS", -1.0)
    with pytest.raises(GateFailedError, match=r"sampler\.onnx: its images differ from the runtime's by"):
        exported(unet, tmp_path / "b", ["sampler"], float_graph=unet_graph, threads=1)
    kept = load_bundle(tmp_path / "b")
    assert [failure["graph"] for failure in kept.manifest["parity_failures"]] == ["sampler.onnx"]


def test_a_plan_with_noise_in_its_steps_is_refused_before_any_work(unet: Checkpoint, tmp_path: Path) -> None:
    noisy = unet.evolve(spec=unet.spec.with_plan(replace(unet.spec.plan, eta=0.5)))
    with pytest.raises(InvalidInputError, match=r"target sampler: eta 0\.5"):
        exported(noisy, tmp_path / "b", ["sampler"])
    assert not (tmp_path / "b").exists()


def test_a_precision_that_onnxruntime_cannot_run_is_refused(unet: Checkpoint, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    with pytest.raises(InvalidInputError, match="target sampler: ONNX Runtime cannot run precision bf16"):
        exported(unet, tmp_path / "b", ["sampler"], precision="bf16")


def test_the_baseline_of_a_run_has_no_sampler(
    unet: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A teacher's plan may be one that a sampler cannot express, and its sampler is not deployed."""
    given: list[ExportConfig] = []

    def exported_with(checkpoint: Checkpoint, out: Path, config: ExportConfig, **_: object) -> Bundle:
        given.append(config)
        raise InvalidInputError("stop here")

    monkeypatch.setattr(run_bundles, "export_bundle", exported_with)
    config = ExportConfig.model_validate({"targets": ["onnx", "sampler", "triton"]})
    with pytest.raises(InvalidInputError, match="stop here"):
        baseline_bundle(unet, config, Workspace(tmp_path))
    assert given[0].targets == ("onnx",)
