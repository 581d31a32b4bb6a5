"""export/run.py: what int8 gains is measured once, kept beside the bundle, told, and reverted where asked."""

from __future__ import annotations

import json

import pytest

from diffpress.compress.pipeline import claim_folder
from diffpress.compress.recipe import read_recipe
from diffpress.export.run import deliver
from diffpress.export.verify.latency import Latency
from diffpress.runtime.bundle import load_bundle, sha256

RECIPE = "stages: [quantize]\nexport: {targets: [onnx], revert_slower: %s}\n"
QUICK, SLOW = Latency("onnxruntime", "int8", 10.0, 6.0), Latency("onnxruntime", "int8", 10.0, 12.0)


@pytest.fixture
def measured(monkeypatch):
    """What the clock will say; how often it was asked."""

    def prepare(*latencies: Latency) -> list[int]:
        asked: list[int] = []
        monkeypatch.setattr("diffpress.export.run.measure_latency", lambda *a: asked.append(1) or list(latencies))
        return asked

    return prepare


@pytest.fixture
def run(wide, wide_graph, scales, tmp_path, monkeypatch):
    """Deliver the quantized checkpoint to one and the same folder."""
    for place in (
        "diffpress.export.bundle.to_onnx",
        "diffpress.export.graph.to_onnx.to_onnx",
    ):  # tracing is tested elsewhere, and slow
        monkeypatch.setattr(place, lambda checkpoint, fixed_size=False: wide_graph)
    quantized = wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))

    def once(revert: bool, checkpoint=quantized):
        (tmp_path / "r.yaml").write_text(RECIPE % str(revert).lower())
        recipe, out = read_recipe(tmp_path / "r.yaml"), tmp_path / "out"
        claim_folder(out, wide, recipe, update=True)
        deliver(checkpoint, wide, recipe, out)
        return out

    return once


def test_a_slower_engine_is_reported_and_left_alone_unless_asked(run, measured, capsys):
    measured(SLOW)
    out = run(revert=False)
    said, bundle = capsys.readouterr().out, load_bundle(out / "bundle")
    assert "int8 is 1.20x of fp32 in onnxruntime: slower" in said
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
    assert "1.20, slower" in said and "1.20, slower" in (out / "report.html").read_text()


def test_on_request_it_takes_the_float_graph_and_no_time_enters_the_bundle(run, measured, capsys):
    measured(SLOW)
    out = run(revert=True)
    bundle = load_bundle(out / "bundle")
    assert bundle.graph("denoiser", "onnxruntime").name == "denoiser.float.onnx"
    assert sha256(bundle.path / "denoiser.float.onnx") == sha256(out / "float" / "denoiser.onnx")
    assert bundle.manifest["metrics"]["reverted"] == ["onnxruntime"]
    assert "_ms" not in (out / "bundle" / "manifest.json").read_text()
    assert "onnxruntime takes denoiser.float.onnx, MiB" in capsys.readouterr().out
    report = json.loads((out / "report.json").read_text())
    assert report["variants"]["onnxruntime"]["precision"] == "fp32" and report["latency"]["batch"] == 8


def test_what_was_measured_once_decides_again_and_the_bundle_stays(run, measured, capsys):
    measured(SLOW)
    first = load_bundle(run(revert=True) / "bundle").hash
    asked = measured(QUICK)  # the clock would say otherwise now
    out = run(revert=True)
    assert not asked and load_bundle(out / "bundle").hash == first
    assert capsys.readouterr().out.count("done before") == 2  # baseline and bundle


def test_another_wish_makes_another_bundle_of_the_same_measurement(run, measured):
    asked = measured(SLOW)
    run(revert=True)
    assert load_bundle(run(revert=False) / "bundle").manifest["graphs"]["denoiser"]["variants"] == {}
    assert asked == [1]


def test_a_quick_engine_keeps_its_integers_though_reverting_was_asked_for(run, measured):
    measured(QUICK)
    assert load_bundle(run(revert=True) / "bundle").manifest["graphs"]["denoiser"]["variants"] == {}


def test_a_float_checkpoint_is_not_timed_and_its_float_graph_is_its_own(run, measured, wide):
    asked = measured(SLOW)
    run(revert=True)
    out = run(revert=True, checkpoint=wide)
    assert asked == [1] and not (out / "latency.json").exists()
    assert list(load_bundle(out / "bundle").manifest["files"]) == ["denoiser.onnx"]
