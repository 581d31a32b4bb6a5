"""export/denoiser.py: engines with a graph of their own run it, and a bundle with such graphs is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.export.graph.model import Graph, load_all
from diffpress.export.lowering import PassContext, lower
from diffpress.export.summary import summary
from diffpress.export.verify.latency import Latency
from diffpress.runtime.bundle import Bundle, load_bundle, sha256
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.errors import GateFailedError, InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampling_plan import OutputCorrection
from tests.export.oracle import exported

ONNXRUNTIME = "onnxruntime"
needs_openvino = pytest.mark.skipif("openvino" not in available(), reason="needs openvino, which alone runs bf16")
REVERTED: dict[str, Any] = {"revert_slower": True, "latencies": [Latency(ONNXRUNTIME, "int8", 10.0, 12.0)]}


@pytest.fixture(scope="module")
def quantized(wide: Checkpoint, scales: Callable[..., Quantization]) -> Checkpoint:
    return wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))


@pytest.fixture(scope="module")
def reverted(quantized: Checkpoint, wide_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An int8 bundle with the float graph as variant for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("out") / "bundle"
    return exported(quantized, folder, float_graph=wide_graph, threads=1, **REVERTED)


def test_the_manifest_lists_which_engine_runs_which_graph(reverted: Bundle) -> None:
    denoiser = reverted.manifest["graphs"]["denoiser"]
    entry = denoiser["variants"][ONNXRUNTIME]
    assert (denoiser["file"], denoiser["precision"]) == ("denoiser.onnx", "int8")
    assert (entry["file"], entry["precision"]) == ("denoiser.float.onnx", "fp32")
    assert entry["bytes"] == (reverted.path / "denoiser.float.onnx").stat().st_size > 3 * denoiser["bytes"]
    assert next(iter(entry["bytes_by_precision"])) == "float32" and entry["parity"]["sqnr_db"] > 80
    assert set(reverted.manifest["files"]) == {"denoiser.onnx", "denoiser.float.onnx"}
    assert any("onnxruntime runs denoiser.float.onnx, fp32" in line for line in summary(reverted))


def test_the_precision_report_is_of_the_graph_that_the_engine_runs(reverted: Bundle) -> None:
    (entry,) = reverted.manifest["engines"]
    assert entry["engine"] == ONNXRUNTIME and entry["graph"] == "denoiser.float.onnx"
    assert entry["graph_sha256"] == sha256(reverted.path / "denoiser.float.onnx")
    assert (entry["integer_mac_share"], entry["fallbacks"]) == (0.0, [])


def test_each_engine_opens_its_own_graph(reverted: Bundle, wide: Checkpoint, wide_graph: Graph) -> None:
    assert reverted.graph("denoiser") == reverted.denoiser == reverted.path / "denoiser.onnx"
    assert reverted.graph("denoiser", ONNXRUNTIME) == reverted.path / "denoiser.float.onnx"
    for name in available():
        with_integers = open_engine(reverted, name, 1)
        share = with_integers.integer_mac_share(dummy_inputs(with_integers, reverted.spec, 2))
        assert share is not None
        assert share == 0.0 if name == ONNXRUNTIME else share > 0.5


def test_a_bundle_with_variants_is_reproducible(
    reverted: Bundle, quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    again = exported(quantized, tmp_path / "b", float_graph=wide_graph, threads=1, **REVERTED)
    assert again.hash == reverted.hash


def test_a_bundle_with_a_missing_variant_is_rejected(
    quantized: Checkpoint, wide_graph: Graph, reverted: Bundle, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(reverted.path, tmp_path / "b")
    (folder / "denoiser.float.onnx").unlink()
    with pytest.raises(InvalidInputError, match=r"denoiser\.float\.onnx: listed in the manifest but missing"):
        load_bundle(folder)


def test_output_corrections_apply_to_the_quantized_graph_only(
    quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    plan = quantized.spec.plan
    plan = replace(plan, output_corrections=tuple(OutputCorrection(0.001, (0.001,)) for _ in plan.timesteps))
    corrected = quantized.evolve(spec=quantized.spec.with_plan(plan))
    bundle = exported(corrected, tmp_path / "b", float_graph=wide_graph, threads=1, **REVERTED)
    assert bundle.manifest["graphs"]["denoiser"]["variants"][ONNXRUNTIME]["parity"]["max_abs"] < 1e-4
    assert bundle.spec.plan.output_corrections and not bundle.spec_for(ONNXRUNTIME).plan.output_corrections
    assert bundle.spec_for("another").plan.output_corrections == plan.output_corrections
    assert np.array_equal(Pipeline(bundle, ONNXRUNTIME).spec.plan.timesteps, plan.timesteps)
    assert not Pipeline(bundle, ONNXRUNTIME).spec.plan.output_corrections


@pytest.mark.parametrize("precision", ["fp32", "fp16", pytest.param("bf16", marks=needs_openvino)])
def test_target_tensorrt_adds_a_graph_of_its_own_form_and_precision(
    precision: str, quantized: Checkpoint, wide_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    built = {}
    monkeypatch.setattr("diffpress.export.bundle.check_build", lambda *_: None)
    monkeypatch.setattr("diffpress.export.bundle.build_engines", lambda _, graphs, *__: built.update(graphs) or [])
    settings: dict[str, Any] = {"float_graph": wide_graph, "threads": 1, "precision": precision, **REVERTED}
    bundle = exported(quantized, tmp_path / "b", ["tensorrt"], **settings)
    label = "int8" if precision == "fp32" else f"int8+{precision}"
    variants = bundle.manifest["graphs"]["denoiser"]["variants"]
    assert list(variants) == [ONNXRUNTIME, "tensorrt"] and variants["tensorrt"]["precision"] == label
    assert "parity" not in variants["tensorrt"] and variants["tensorrt"]["file"] == "denoiser.tensorrt.onnx"
    path, built_precision = built["denoiser"]
    assert (path.name, built_precision) == ("denoiser.tensorrt.onnx", label)
    assert set(bundle.manifest["files"]) == {"denoiser.onnx", "denoiser.float.onnx", "denoiser.tensorrt.onnx"}


def test_a_graph_for_tensorrt_in_half_precision_is_verified(
    quantized: Checkpoint, wide_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last layer is damaged, which neither denoiser.onnx nor the float graph shows."""

    def damaged(graph: Graph, target: str, context: PassContext) -> Graph:
        graph = lower(graph, target, context)
        if target != "tensorrt":
            return graph
        proto = load_all(graph)
        (bias,) = (tensor for tensor in proto.graph.initializer if tensor.name.startswith("last.bias"))
        bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.5), bias.name))
        return Graph(proto)

    monkeypatch.setattr("diffpress.export.bundle.check_build", lambda *_: None)
    monkeypatch.setattr("diffpress.export.denoiser.lower", damaged)
    with pytest.raises(GateFailedError, match=r"denoiser\.tensorrt\.onnx in .* torch's fake quantization has"):
        exported(quantized, tmp_path / "b", ["tensorrt"], float_graph=wide_graph, threads=1, precision="fp16")
    assert not list((tmp_path / "b").glob("*.probed"))
