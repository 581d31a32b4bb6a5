"""`diffpress profile`: what it prints and writes, which component it measures, and what it refuses."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import diffpress.runtime.benchmarking.bundle_profile as bundle_profile
from diffpress.cli.main import main
from diffpress.runtime.benchmarking import profiling
from diffpress.runtime.benchmarking.peaks import Peaks
from diffpress.runtime.bundle import MANIFEST, seal
from diffpress.runtime.io.onnx_wire import Node, model_bytes

TINY = Path(__file__).parents[1] / "runtime" / "tiny_bundle"
FIELDS = {
    *("bundle", "engine", "component", "batch", "sample_shape", "threads", "precision", "machine", "step_ms"),
    *("profiled_ms", "layers_ms", "noise", "preemptions", "disturbed", "peaks", "operations", "layers", "findings"),
}

WITHOUT_EXTRAS = """
import sys
for name in ("torch", "onnx", "openvino", "matplotlib", "jinja2", "pydantic"):
    sys.modules[name] = None
from diffpress.runtime.benchmarking import peak_kernels, peaks
peaks.PROFILERS, peaks.COPIED_MIB = 1, (0.25, 1.0)
peak_kernels.SIZES, peak_kernels.FAST = {"fp32": (32, 64, 16)}, (32, 64, 16)
from diffpress.cli.main import main
sys.exit(main(["profile", sys.argv[1], "--threads", "1", "--json", sys.argv[2]]))
"""


@pytest.fixture
def known_peaks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle_profile, "measured_peaks", lambda *_: Peaks({"fp32": 100.0}, {1.0: 10.0}))
    monkeypatch.setattr(profiling, "BLOCKS", 1)


def profile(*arguments: object) -> int:
    return main(["profile", *map(str, arguments)])


@pytest.mark.usefixtures("known_peaks")
def test_it_prints_the_tables_and_writes_every_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "profile.json"
    assert profile(TINY, "--engine", "onnxruntime", "--batch", 2, "--top", 2, "--threads", 1, "--json", file) == 0
    printed, found = capsys.readouterr().out, json.loads(file.read_text())
    assert set(found) == FIELDS and found["engine"] == "onnxruntime" and found["batch"] == 2
    names = {row["name"] for row in found["layers"]}
    assert len(names) >= 3
    assert sum(row["ms"] for row in found["layers"]) == pytest.approx(found["layers_ms"])
    assert sum(row["ms"] for row in found["operations"]) == pytest.approx(found["layers_ms"])
    assert f"{found['layers_ms'] / found['profiled_ms']:.1%} of the profiled step" in printed
    assert "peaks measured here: fp32 100 GMAC/s; 10.0 GB/s for 1 MiB" in printed
    table = printed.split("layer  ")[1].split("\n\n")[0].splitlines()
    assert len(table) == 2 + 2  # the head, its rule and --top layers
    assert "Worth doing" in printed or "Nothing is worth doing" in printed


@pytest.mark.usefixtures("known_peaks")
def test_another_graph_of_the_bundle_is_measured_with_inputs_of_its_shapes(tmp_path: Path) -> None:
    bundle, file = Path(shutil.copytree(TINY, tmp_path / "bundle")), tmp_path / "profile.json"
    image = (1, 1, 8, 8)
    decoder = model_bytes(
        [(Node("Relu", "only", ("latent_sample",), ("y",)), {})], {}, {"latent_sample": image}, {"y": image}
    )
    (bundle / "vae_decoder.onnx").write_bytes(decoder)
    manifest: dict[str, Any] = json.loads((bundle / MANIFEST).read_text())
    shape = ["batch", 1, "latent_height", "latent_width"]
    inputs = {"latent_sample": {"dtype": "float32", "shape": shape}}
    manifest["graphs"]["vae_decoder"] = {"file": "vae_decoder.onnx", "inputs": inputs}
    content = {key: value for key, value in manifest.items() if key not in ("files", "hash")}
    seal(bundle, content)
    command = (bundle, "--engine", "onnxruntime", "--component", "vae_decoder", "--batch", 3, "--json", file)
    assert profile(*command) == 0
    (row,) = json.loads(file.read_text())["layers"]
    assert (row["name"], row["bytes"]) == ("only", 2 * 4 * 64)  # an autoencoder runs one image at a time


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--component", "denoisr"), "unknown component 'denoisr': did you mean 'denoiser'?"),
        (("--component", "cached"), "unknown component 'cached'"),
        (("--batch", 0), "batch 0: must be at least 1"),
        (("--top", 0), "--top 0: must be at least 1"),
        (("--streams", 2), "2 streams: a profile is that of one evaluation"),
        (("--size", "16x16"), "makes 8x8 images only"),
        (("--engine", "onnxrt"), "unknown engine 'onnxrt'"),
    ],
)
def test_what_makes_no_sense_is_refused(
    arguments: tuple[object, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert profile(TINY, *arguments) == 2
    assert message in capsys.readouterr().err


def test_it_needs_no_package_but_onnxruntime(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_EXTRAS, TINY, file],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"DIFFPRESS_CACHE": str(tmp_path / "cache")},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(file.read_text())
    assert found["engine"] == "onnxruntime" and found["peaks"]["gmacs"].keys() == {"fp32", "int8"}
