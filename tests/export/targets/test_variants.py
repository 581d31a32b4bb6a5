"""export/targets/variants.py: engines with a variant run it, and a bundle with variants is complete."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.export.bundle import write_bundle
from diffpress.export.graph.model import Graph
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.summary import summary
from diffpress.export.targets.variants import FLOAT, Variant
from diffpress.runtime.bundle import Bundle, load_bundle, sha256
from diffpress.runtime.engines import available, open_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.pipeline import Pipeline
from diffpress.runtime.sampling_plan import OutputCorrection

ONNXRUNTIME = "onnxruntime"


@pytest.fixture(scope="module")
def quantized(wide: Checkpoint, scales: Callable[..., Quantization]) -> Checkpoint:
    return wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))


@pytest.fixture(scope="module")
def reverted(quantized: Checkpoint, wide_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """An int8 bundle with the float graph as variant for ONNX Runtime."""
    folder = tmp_path_factory.mktemp("out") / "bundle"
    variant = Variant(FLOAT, (ONNXRUNTIME,), wide_graph, None)
    return write_bundle(quantized, folder, float_graph=wide_graph, variants=[variant], threads=1)


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


def test_a_variant_with_another_placement_is_checked_against_its_own_quantization(
    quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    assert quantized.quantization is not None
    weights_only = {key: value for key, value in quantized.quantization.amax.items() if key.endswith(".weight")}
    other = replace(quantized.quantization, amax=weights_only)
    variant = Variant("weights", (ONNXRUNTIME,), insert_qdq(wide_graph, other), other)
    bundle = write_bundle(quantized, tmp_path / "b", float_graph=wide_graph, variants=[variant], threads=1)
    entry = bundle.manifest["graphs"]["denoiser"]["variants"][ONNXRUNTIME]
    assert (entry["file"], entry["precision"]) == ("denoiser.weights.onnx", "int8")
    assert entry["parity"]["sqnr_db"] > bundle.manifest["parity"][ONNXRUNTIME]["sqnr_db"]


def test_a_bundle_with_variants_is_reproducible(
    reverted: Bundle, quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    variant = Variant(FLOAT, (ONNXRUNTIME,), wide_graph, None)
    again = write_bundle(quantized, tmp_path / "b", float_graph=wide_graph, variants=[variant], threads=1)
    assert again.hash == reverted.hash


def test_a_bundle_with_a_missing_variant_is_rejected(
    quantized: Checkpoint, wide_graph: Graph, reverted: Bundle, tmp_path: Path
) -> None:
    import shutil

    folder = shutil.copytree(reverted.path, tmp_path / "b")
    (folder / "denoiser.float.onnx").unlink()
    with pytest.raises(InvalidInputError, match=r"denoiser\.float\.onnx: listed in the manifest but missing"):
        load_bundle(folder)


@pytest.mark.parametrize(
    ("engines", "message"),
    [(("onnxruntim",), "did you mean 'onnxruntime'"), ((ONNXRUNTIME,) * 2, "runs only one graph")],
)
def test_an_unknown_engine_or_one_with_two_graphs_is_rejected(
    engines: tuple[str, ...], message: str, quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    variants = [Variant(f"v{i}", (engine,), wide_graph, None) for i, engine in enumerate(engines)]
    with pytest.raises(InvalidInputError, match=message):
        write_bundle(quantized, tmp_path / "b", float_graph=wide_graph, variants=variants)


def test_output_corrections_apply_to_the_quantized_graph_only(
    quantized: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    plan = quantized.spec.plan
    plan = replace(plan, output_corrections=tuple(OutputCorrection(0.001, (0.001,)) for _ in plan.timesteps))
    corrected = quantized.evolve(spec=quantized.spec.with_plan(plan))
    variant = Variant(FLOAT, (ONNXRUNTIME,), wide_graph, None)
    bundle = write_bundle(corrected, tmp_path / "b", float_graph=wide_graph, variants=[variant], threads=1)
    assert bundle.manifest["graphs"]["denoiser"]["variants"][ONNXRUNTIME]["parity"]["max_abs"] < 1e-4
    assert bundle.spec.plan.output_corrections and not bundle.spec_for(ONNXRUNTIME).plan.output_corrections
    assert bundle.spec_for("another").plan.output_corrections == plan.output_corrections
    assert np.array_equal(Pipeline(bundle, ONNXRUNTIME).spec.plan.timesteps, plan.timesteps)
    assert not Pipeline(bundle, ONNXRUNTIME).spec.plan.output_corrections
