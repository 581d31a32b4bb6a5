"""export/run.py: int8 latency is measured once, stored and reported; slower engines can be reverted."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.pipeline import claim_folder
from diffpress.compress.recipe import Recipe
from diffpress.export.graph.model import Graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.run import export_and_report
from diffpress.export.verify.latency import Latency
from diffpress.runtime.bundle import load_bundle, sha256
from diffpress.runtime.errors import GateFailedError
from diffpress.runtime.sampling_plan import OutputCorrection
from diffpress.runtime.spec import DenoiserSpec
from tests.export.oracle import measured_scales

RECIPE = "stages: [quantize]\nexport: {targets: [onnx], revert_slower: %s%s}\n"
QUICK, SLOW = Latency("onnxruntime", "int8", 10.0, 6.0), Latency("onnxruntime", "int8", 10.0, 12.0)


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[int]]:
    """Replace the latency measurement; returns a list with one entry per measurement."""

    def prepare(*latencies: Latency) -> list[int]:
        timings: list[int] = []

        def measure(*arguments: object) -> list[Latency]:
            timings.append(1)
            return list(latencies)

        monkeypatch.setattr("diffpress.export.run_bundles.measure_latencies", measure)
        return timings

    return prepare


@pytest.fixture
def traced(wide_graph: Graph, monkeypatch: pytest.MonkeyPatch) -> list[tuple[DenoiserSpec, bool]]:
    """Replace tracing, which is slow and tested elsewhere; returns the arguments of every call."""
    calls: list[tuple[DenoiserSpec, bool]] = []

    def traced_before(model: nn.Module, spec: DenoiserSpec, fixed_size: bool) -> Graph:
        calls.append((spec, fixed_size))
        return to_onnx(model, spec, fixed_size) if fixed_size else wide_graph

    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", traced_before)
    return calls


@pytest.fixture
def run(
    wide: Checkpoint, traced: list[Any], scales: Callable[..., Quantization], tmp_path: Path
) -> Callable[..., Path]:
    """Deliver the quantized checkpoint repeatedly to the same folder."""
    quantized = wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))

    def once(revert: bool, checkpoint: Checkpoint = quantized, settings: str = "", gates: str = "") -> Path:
        (tmp_path / "r.yaml").write_text(RECIPE % (str(revert).lower(), settings) + gates)
        recipe, out = Recipe.load(tmp_path / "r.yaml"), tmp_path / "out"
        claim_folder(out, wide, recipe, update=True)
        export_and_report(checkpoint, wide, recipe, out)
        return out

    return once


def test_a_slower_engine_is_reported_and_not_reverted_by_default(
    run: Callable[..., Path], measured: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    measured(SLOW)
    out = run(revert=False)
    printed, bundle = caplog.text, load_bundle(out / "bundle")
    assert "int8 is 1.20x of fp32 in onnxruntime: slower" in printed
    assert bundle.graph("denoiser", "onnxruntime").name == "denoiser.onnx"
    row = json.loads((out / "latency.json").read_text())["engines"][0]
    assert row == {
        "engine": "onnxruntime",
        "precision": "int8",
        "float_ms": 10.0,
        "quantized_ms": 12.0,
        "latency_ratio": 1.2,
        "slower": True,
    }
    assert "1.20, slower" in printed and "1.20, slower" in (out / "report.html").read_text()


def test_on_request_it_runs_the_float_graph_and_no_timing_enters_the_bundle(
    run: Callable[..., Path], measured: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    measured(SLOW)
    out = run(revert=True)
    bundle = load_bundle(out / "bundle")
    assert bundle.graph("denoiser", "onnxruntime").name == "denoiser.float.onnx"
    assert sha256(bundle.path / "denoiser.float.onnx") == sha256(out / "float" / "denoiser.onnx")
    assert bundle.manifest["metrics"]["reverted"] == ["onnxruntime"]
    assert "_ms" not in (out / "bundle" / "manifest.json").read_text()
    assert "onnxruntime uses denoiser.float.onnx, MiB" in caplog.text
    report = json.loads((out / "report.json").read_text())
    assert report["variants"]["onnxruntime"]["precision"] == "fp32" and report["latency"]["batch"] == 8


def test_a_stored_measurement_is_reused_and_the_bundle_stays_the_same(
    run: Callable[..., Path], measured: Callable[..., list[int]], caplog: pytest.LogCaptureFixture
) -> None:
    measured(SLOW)
    first = load_bundle(run(revert=True) / "bundle").hash
    timings = measured(QUICK)  # a new measurement would give another result
    out = run(revert=True)
    assert not timings and load_bundle(out / "bundle").hash == first
    assert caplog.text.count("done before") == 2  # baseline and bundle


def test_another_setting_gives_another_bundle_from_the_same_measurement(
    run: Callable[..., Path], measured: Callable[..., list[int]]
) -> None:
    timings = measured(SLOW)
    run(revert=True)
    assert load_bundle(run(revert=False) / "bundle").manifest["graphs"]["denoiser"]["variants"] == {}
    assert timings == [1]


def test_a_faster_engine_keeps_the_int8_graph_when_reverting_is_enabled(
    run: Callable[..., Path], measured: Callable[..., list[int]]
) -> None:
    measured(QUICK)
    assert load_bundle(run(revert=True) / "bundle").manifest["graphs"]["denoiser"]["variants"] == {}


def test_a_size_of_the_recipe_fixes_the_graphs_of_both_bundles(
    run: Callable[..., Path], measured: Callable[..., list[int]], traced: list[Any]
) -> None:
    measured(QUICK)
    out = run(revert=False, settings=", size: [16, 8]")
    assert len(traced) == 2 and all(spec.image_size == (16, 8) and fixed_size for spec, fixed_size in traced)
    for name in ("bundle", "baseline"):
        bundle = load_bundle(out / name)
        assert bundle.spec.image_size == (16, 8) and bundle.manifest["metrics"]["size"] == [16, 8]
    run(revert=False)  # without it, both are made again
    assert load_bundle(out / "bundle").spec.image_size == load_bundle(out / "baseline").spec.image_size == (8, 8)
    assert "size" not in load_bundle(out / "bundle").manifest["metrics"]


def test_a_recipes_parity_gate_replaces_the_built_in_bound_and_everything_is_kept(
    run: Callable[..., Path], measured: Callable[..., list[int]], tmp_path: Path
) -> None:
    measured(QUICK)
    with pytest.raises(GateFailedError, match=r"parity_sqnr_db is \d+\.\d+, the bound is 199\. The work is kept"):
        run(revert=False, gates="gates: {parity_sqnr_db: 199}\n")
    out = tmp_path / "out"
    (gate,) = json.loads((out / "gates.json").read_text())
    assert not gate["passed"] and load_bundle(out / "bundle").manifest["parity_failures"]
    assert (out / "comparison.png").is_file() and (out / "report.json").is_file()
    run(revert=False, gates="gates: {parity_sqnr_db: 5}\n")  # the bundle is made again, without the mark
    assert "parity_failures" not in load_bundle(out / "bundle").manifest


def test_a_model_that_quantization_destroys_fails_by_default_and_can_be_accepted(
    run: Callable[..., Path],
    measured: Callable[..., list[int]],
    wide: Checkpoint,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its corrections are wrong, so torch's fake quantization and the engines agree on useless samples."""
    measured(QUICK)
    plan = wide.spec.plan
    wrong = replace(plan, clip=False, output_corrections=(OutputCorrection(0.0, (20.0,)),) * plan.steps)
    scales = measured_scales(wide, weight_range=127 / 64, outputs=True)
    destroyed = wide.evolve(quantization=scales, spec=wide.spec.with_plan(wrong))
    with pytest.raises(GateFailedError, match=r"-\d+\.\d dB SQNR to torch .* 0 dB are required") as caught:
        run(revert=False, checkpoint=destroyed)
    assert "\n" not in str(caught.value) and "further from the float model's than zeros are" in str(caught.value)
    reason = json.loads((tmp_path / "out" / "gates.json").read_text())[0]["reason"]
    assert "denoiser.onnx in onnxruntime" in reason
    run(revert=False, checkpoint=destroyed, gates="gates: {parity_sqnr_db: -60}\n")
    assert "further from the float model's than zeros are" in caplog.text  # a warning in any case


def test_a_float_checkpoint_is_not_timed_and_has_only_its_float_graph(
    run: Callable[..., Path], measured: Callable[..., list[int]], wide: Checkpoint
) -> None:
    timings = measured(SLOW)
    run(revert=True)
    out = run(revert=True, checkpoint=wide)
    assert timings == [1] and not (out / "latency.json").exists()
    assert list(load_bundle(out / "bundle").manifest["files"]) == ["denoiser.onnx"]
