"""Bundles in half precision: manifest, parity bounds and rejected options."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.load import load_checkpoint
from diffpress.export.bundle import check_export
from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.passes.half_precision import to_half
from diffpress.export.verify.gate import FLOAT_SQNR_DB
from diffpress.export.verify.parity import COMPONENT_SQNR_DB, check_parity, runs
from diffpress.runtime import generate, open_engine
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.engines import available
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import exported, measured_scales
from tests.export.passes.test_half_precision import both
from tests.export.verify.test_parity import reference_of

needs_openvino = pytest.mark.skipif("openvino" not in available(), reason="needs openvino, which alone runs bf16")
needs_tensorrt = pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="needs tensorrt-rtx")


@pytest.fixture(scope="module")
def bundles(unet: Checkpoint, unet_graph: Graph, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    made = {}

    def bundle(precision: str) -> Bundle:
        if precision not in made:
            folder = tmp_path_factory.mktemp("half") / precision
            made[precision] = exported(unet, folder, float_graph=unet_graph, threads=1, precision=precision)
        return made[precision]

    return bundle


@both
@needs_openvino
def test_the_manifest_describes_the_graph_and_its_inputs_and_outputs_are_float32(
    precision: str, bundles: Callable[[str], Bundle]
) -> None:
    half, full = bundles(precision).manifest["graphs"]["denoiser"], bundles("fp32").manifest["graphs"]["denoiser"]
    assert (half["precision"], full["precision"]) == (precision, "fp32")
    assert (half["inputs"], half["outputs"]) == (full["inputs"], full["outputs"])
    assert {entry["dtype"] for entry in half["outputs"].values()} == {"float32"}
    sizes = half["bytes_by_precision"]
    name = {"fp16": "float16", "bf16": "bfloat16"}[precision]
    assert sizes[name] == pytest.approx(full["bytes_by_precision"]["float32"] / 2, rel=0.02)
    assert sizes["float32"] < 0.02 * sizes[name] and half["bytes"] < 0.62 * full["bytes"]


@both
@needs_openvino
def test_parity_covers_full_trajectories_in_the_engines_that_run_it(
    precision: str, bundles: Callable[[str], Bundle]
) -> None:
    found = bundles(precision).manifest["parity"]
    assert set(found) == set(runs(precision)) == set(available()) - ({"onnxruntime"} if precision == "bf16" else set())
    assert all(row["steps"] == 4 and FLOAT_SQNR_DB[precision] < row["sqnr_db"] < 100 for row in found.values())


@needs_openvino
def test_the_same_runtime_samples_it(bundles: Callable[[str], Bundle]) -> None:
    images = {}
    for precision in ("fp32", "fp16", "bf16"):
        engine = open_engine(bundles(precision), "openvino", threads=1)
        images[precision] = generate(engine, bundles(precision).spec, seeds=range(2))
    differences = {name: np.abs(image - images["fp32"]).max() for name, image in images.items()}
    assert 0 == differences["fp32"] < differences["fp16"] < differences["bf16"] < 0.2


@needs_openvino
def test_onnxruntime_rejects_bf16_in_one_line(bundles: Callable[[str], Bundle]) -> None:
    with pytest.raises(InvalidInputError, match=r"denoiser\.onnx: ONNX Runtime cannot load it") as caught:
        open_engine(bundles("bf16"), "onnxruntime", threads=1)
    assert "\n" not in str(caught.value)


def test_a_half_precision_graph_that_deviates_fails(unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    half, _ = to_half(unet_graph, "fp16")
    proto = load_all(half)
    bias = next(tensor for tensor in proto.graph.initializer if tensor.name.startswith("conv_out.bias"))
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float16(0.05), bias.name))
    save_graph(Graph(proto), tmp_path / "g.onnx")
    found = check_parity(tmp_path / "g.onnx", reference_of(unet), engines=["onnxruntime"], threads=1, precision="fp16")
    expected = (
        r"g.onnx in onnxruntime: .* dB SQNR to torch .*, 40 dB are required in fp16; use --precision bf16 or fp32"
    )
    assert re.search(expected, found.failures[0].message)
    assert [path.name for path in tmp_path.iterdir()] == ["g.onnx"]


def test_a_precision_that_no_graph_would_use_is_rejected_before_any_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.export.bundle.check_build", lambda *_: None)
    message = "stay fp32 in engines on the CPU.* add target tensorrt"
    with pytest.raises(InvalidInputError, match=message) as caught:
        check_export(ExportConfig(precision="fp16", targets=("onnx",)), quantized=True)
    assert "\n" not in str(caught.value)
    check_export(ExportConfig(precision="fp16", targets=("tensorrt",)), quantized=True)
    check_export(ExportConfig(precision="fp32", targets=("onnx",)), quantized=True)


def test_bf16_needs_an_engine_that_runs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("diffpress.export.verify.parity.available", lambda: ["onnxruntime"])
    with pytest.raises(
        InvalidInputError, match=r"precision bf16: ONNX Runtime cannot run it.* install openvino, or use fp16"
    ):
        check_export(ExportConfig(precision="bf16"), quantized=False)
    check_export(ExportConfig(precision="fp16"), quantized=False)


# --- a pipeline ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["fp16", pytest.param("bf16", marks=pytest.mark.slow)])
@needs_openvino
def test_a_pipelines_text_encoder_is_in_half_precision_but_not_its_decoder(
    precision: str, tiny_folder: Callable[..., Path], sd_bundle: Path, tmp_path: Path
) -> None:
    checkpoint, graph = load_checkpoint(str(tiny_folder("sd"))), Graph(onnx.load(load_bundle(sd_bundle).denoiser))
    bundle = exported(checkpoint, tmp_path / "b", float_graph=graph, threads=1, precision=precision)
    graphs = bundle.manifest["graphs"]
    kinds = {name: entry["precision"] for name, entry in graphs.items()}
    assert kinds == {"denoiser": precision, "text_encoder": precision, "vae_decoder": "fp32"}
    for name, entry in graphs.items():
        proto = onnx.load(bundle.path / entry["file"])
        onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True)
        assert {value.type.tensor_type.elem_type for value in proto.graph.output} == {onnx.TensorProto.FLOAT}
        if name != "denoiser":
            assert all(sqnr > COMPONENT_SQNR_DB[kinds[name]] for sqnr in entry["parity"].values())
    config = json.loads((bundle.path / "unet" / "config.json").read_text())
    assert config["_class_name"] == "UNet2DConditionModel"
    assert load_bundle(bundle.path).hash == bundle.hash


@pytest.mark.slow
@needs_openvino
def test_components_of_another_bundle_are_reused_where_they_are_the_same(
    tiny_folder: Callable[..., Path], tmp_path: Path
) -> None:
    checkpoint = load_checkpoint(str(tiny_folder("sd")))
    full = exported(checkpoint, tmp_path / "whole", threads=1)
    half = exported(checkpoint, tmp_path / "half", threads=1, reuse=full, precision="fp16")
    data = "model.onnx_data"
    shared = {
        component: (half.path / component / data).stat().st_ino == (full.path / component / data).stat().st_ino
        for component in ("text_encoder", "vae_decoder")
    }
    assert shared == {"text_encoder": False, "vae_decoder": True}
    assert half.manifest["graphs"]["text_encoder"]["precision"] == "fp16"


# --- TensorRT --------------------------------------------------------------------------------------------------


@both
@needs_tensorrt
def test_tensorrt_builds_it_strongly_typed(precision: str, unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    options: dict[str, Any] = {"float_graph": unet_graph, "threads": 1, "capabilities": ["8.6", "12.0"]}
    bundle = exported(unet, tmp_path / "b", ["tensorrt"], precision=precision, **options)
    engine = next(entry for entry in bundle.manifest["engines"] if "compute_capabilities" in entry)
    assert (bundle.path / engine["file"]).stat().st_size > 100_000


@both
@needs_tensorrt
def test_tensorrt_builds_int8_with_the_rest_in_half_precision(
    precision: str, unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    quantized = unet.evolve(quantization=measured_scales(unet, weight_range=127 / 64))
    options: dict[str, Any] = {"float_graph": unet_graph, "threads": 1, "capabilities": ["8.6"]}
    bundle = exported(quantized, tmp_path / "b", ["tensorrt"], precision=precision, **options)
    types = {tensor.data_type for tensor in onnx.load(bundle.path / "denoiser.tensorrt.onnx").graph.initializer}
    half = {"fp16": onnx.TensorProto.FLOAT16, "bf16": onnx.TensorProto.BFLOAT16}[precision]
    assert {onnx.TensorProto.INT8, half} <= types
    assert bundle.manifest["graphs"]["denoiser"]["precision"] == "int8"
    assert onnx.TensorProto.FLOAT16 not in {t.data_type for t in onnx.load(bundle.denoiser).graph.initializer}
