"""Number formats: stored in few bits, and computed in engines as by formula and torch's quantizers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.dry_run import dry_run
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.nvfp4 import fake_nvfp4
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.recipe import Recipe
from diffpress.export.graph.model import Graph, load_all, save_graph, weight_of
from diffpress.export.graph.opsets import opset_of, with_min_opset
from diffpress.export.graph.trace import trace
from diffpress.export.manifest import bytes_by_precision
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, measured_scales, quantized_graph, run_exactly

ON_CPU = ("int8", "fp8", "int4", "w4a8")
OPSETS = {"int8": 18, "fp8": 19, "int4": 21, "w4a8": 21}


def calibrated(
    checkpoint: Checkpoint, kind: str, layers: Callable[[str], bool] = lambda name: True, weight_range: float = 1.0
) -> Quantization:
    """Return scales in `kind` for convolution and linear layers in `layers`, and convolution outputs."""
    chosen = {name: layer for name, layer in checkpoint.model.named_modules() if layers(name)}
    chosen = {name: layer for name, layer in chosen.items() if isinstance(layer, nn.Conv2d | nn.Linear)}
    formats = dict.fromkeys(chosen, kind)
    found = measured_scales(checkpoint, kind=kind, formats=formats, outputs=True, weight_range=weight_range)
    linear = {f"{name}.output" for name, layer in chosen.items() if isinstance(layer, nn.Linear)}
    return replace(found, amax={key: value for key, value in found.amax.items() if key not in linear})


def rounded(x: torch.Tensor, amax: torch.Tensor, number: str, lowest: int | None = None) -> torch.Tensor:
    """Return x rounded by the format's formula, in plain torch; a row has as many blocks as it has scales."""
    largest = {"int8": 127, "int4": 7, "float8_e4m3fn": 448}[number]
    rows = x.flatten(1).unflatten(1, (amax[0].numel(), -1)) if amax.dim() else x
    scale = (amax.reshape(len(amax), -1, 1) if amax.dim() else amax) / largest
    if largest == 448:
        levels = (rows / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float()
    else:
        levels = torch.round(rows / scale).clamp(-largest if lowest is None else lowest, largest)
    return (levels * scale).view_as(x)


def by_formula(checkpoint: Checkpoint, quantization: Quantization, inputs: dict[str, np.ndarray]) -> np.ndarray:
    model, amax = checkpoint.clone_model(), quantization.amax
    for name, layer in model.named_modules():
        if f"{name}.weight" not in amax:
            continue
        form = FORMATS[quantization.format_of(name)]
        layer.weight.data = rounded(layer.weight.data, amax[f"{name}.weight"], form.weights.name)
        if f"{name}.input" in amax:
            assert form.activations is not None
            q = partial(rounded, amax=amax[f"{name}.input"], number=form.activations.name, lowest=-128)
            layer.register_forward_pre_hook(lambda _, args, q=q: (q(args[0]),))
        if f"{name}.output" in amax:
            assert form.activations is not None
            q = partial(rounded, amax=amax[f"{name}.output"], number=form.activations.name, lowest=-128)
            layer.register_forward_hook(lambda _, args, out, q=q: q(out))
    with torch.no_grad():
        feed = {name: torch.from_numpy(value) for name, value in inputs.items()}
        return adapter_for(model).forward(model, feed).numpy()


@pytest.mark.parametrize("kind", ON_CPU)
def test_one_layer_computes_its_formula(kind: str, everything: Checkpoint, everything_graph: Graph) -> None:
    """A single rounding accumulates no error: torch's quantizers, the formula and the graph agree."""
    for layer in ("twin_b", "down", "gemm", "matmul", "unbiased", "twice"):
        # the largest weights are clipped, at -7 or -127 and at 7 or 127
        quantization, inputs = calibrated(everything, kind, layer.__eq__, weight_range=0.8), inputs_for(everything)
        plain = TorchNetwork(everything.model, everything.spec).run(inputs)
        expected = by_formula(everything, quantization, inputs)
        modelopts = TorchNetwork(fake_quantized(everything.evolve(quantization=quantization)), everything.spec)
        found = run_exactly(quantized_graph(everything_graph, quantization), inputs)
        for output in (modelopts.run(inputs), found):
            assert np.median(np.abs(output - expected)) < 2e-6
            assert sqnr_db(expected, output) > sqnr_db(plain, expected) + 10


@pytest.mark.parametrize("kind", ON_CPU)
def test_a_unet_computes_the_formula_in_torch_and_in_onnxruntime(
    kind: str, unet: Checkpoint, unet_graph: Graph
) -> None:
    quantization, inputs = calibrated(unet, kind), inputs_for(unet)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    expected = by_formula(unet, quantization, inputs)
    modelopts = TorchNetwork(fake_quantized(unet.evolve(quantization=quantization)), unet.spec).run(inputs)
    found = run_exactly(quantized_graph(unet_graph, quantization), inputs)
    assert sqnr_db(plain, expected) < 40
    for output in (modelopts, found):
        assert sqnr_db(expected, output) > (100 if kind == "int4" else sqnr_db(plain, expected) + 1)
        assert abs(sqnr_db(plain, output) - sqnr_db(plain, expected)) < 1.0


@pytest.mark.parametrize("engine", available())
@pytest.mark.parametrize("kind", ON_CPU)
def test_engines_reach_the_sqnr_of_each_format(
    kind: str, engine: str, unet: Checkpoint, unet_graph: Graph, tmp_path: Path
) -> None:
    # int8 within 7 bits: processors without VNNI saturate otherwise
    quantization, inputs = calibrated(unet, kind, weight_range=127 / 64 if kind == "int8" else 1.0), inputs_for(unet)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    save_graph(quantized_graph(unet_graph, quantization), tmp_path / "q.onnx")
    loaded = load_engine(tmp_path / "q.onnx", engine, threads=1)
    assert sqnr_db(plain, loaded.run(inputs)) > sqnr_db(plain, by_formula(unet, quantization, inputs)) - 1.0
    share = loaded.integer_mac_share(inputs)
    assert share is not None
    assert share > 0.9 if kind in ("int8", "w4a8") else share == 0.0


@pytest.mark.parametrize(
    ("kind", "dtype", "most"), [("int4", "int4", 0.20), ("w4a8", "int4", 0.16), ("fp8", "float8_e4m3fn", 0.28)]
)
def test_files_shrink_and_bytes_are_counted_as_they_are_stored(
    kind: str, dtype: str, most: float, wide: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    graph = quantized_graph(wide_graph, calibrated(wide, kind))
    save_graph(wide_graph, tmp_path / "f.onnx")
    size = save_graph(graph, tmp_path / "q.onnx")
    assert size == (tmp_path / "q.onnx").stat().st_size < most * (tmp_path / "f.onnx").stat().st_size
    counted = bytes_by_precision(graph)
    assert next(iter(counted)) == dtype and 0 <= size - sum(counted.values()) < 8000  # the rest: names and nodes
    weights = sum(p.numel() for name, p in wide.model.named_parameters() if name.endswith("weight"))
    assert counted[dtype] == pytest.approx(weights * (1 if kind == "fp8" else 0.5), rel=0.002)


@pytest.mark.parametrize("kind", ON_CPU)
def test_the_external_data_form_has_the_same_numbers(
    kind: str, wide: Checkpoint, wide_graph: Graph, tmp_path: Path
) -> None:
    graph = quantized_graph(wide_graph, calibrated(wide, kind))
    save_graph(graph, tmp_path / "inline.onnx")
    save_graph(graph, tmp_path / "split.onnx", data="split.data")
    one, two = (onnx.load(tmp_path / name).graph.initializer for name in ("inline.onnx", "split.onnx"))
    found = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in two}
    for tensor in one:
        np.testing.assert_array_equal(onnx.numpy_helper.to_array(tensor), found[tensor.name])
    inputs = inputs_for(wide, 2)
    split = load_engine(tmp_path / "split.onnx", "onnxruntime", 1).run(inputs)
    np.testing.assert_array_equal(split, load_engine(tmp_path / "inline.onnx", "onnxruntime", 1).run(inputs))


@pytest.mark.parametrize("kind", ON_CPU)
def test_only_a_format_that_needs_it_raises_the_opset(kind: str, unet: Checkpoint, unet_graph: Graph) -> None:
    graph = quantized_graph(unet_graph, calibrated(unet, kind))
    assert opset_of(graph) == OPSETS[kind] and opset_of(unet_graph) == 18
    onnx.checker.check_model(load_all(graph), full_check=True)


@pytest.mark.parametrize("opset", [19, 21, 23])
def test_a_raised_opset_does_not_change_the_output(opset: int, unet: Checkpoint, unet_graph: Graph) -> None:
    inputs = inputs_for(unet)
    np.testing.assert_array_equal(
        run_exactly(with_min_opset(unet_graph, opset), inputs), run_exactly(unet_graph, inputs)
    )


def test_an_operator_redefined_in_a_later_opset_is_rejected(unet_graph: Graph) -> None:
    proto = load_all(unet_graph)
    proto.graph.node[3].op_type = "GroupNormalization"
    with pytest.raises(InvalidInputError, match="GroupNormalization was redefined in ONNX opset 21"):
        with_min_opset(Graph(proto), 21)
    assert opset_of(with_min_opset(Graph(proto), 19)) == 19


def test_format_overrides_store_every_layer_in_its_own_format(unet: Checkpoint, unet_graph: Graph) -> None:
    four = calibrated(unet, "w4a8", lambda name: name.startswith("mid_block"))
    eight = calibrated(unet, "int8", lambda name: not name.startswith("mid_block"))
    mixed = Quantization("int8", eight.amax | four.amax, dict.fromkeys(four.layers, "w4a8"))
    graph = quantized_graph(unet_graph, mixed)
    types = {name: weight_of(graph, name).dtype.name for name in graph.weights}
    assert types["mid_block.resnets.0.conv1.weight_int4"] == "int4" and types["conv_in.weight_int8"] == "int8"
    inputs = inputs_for(unet)
    expected = by_formula(unet, mixed, inputs)
    plain = TorchNetwork(unet.model, unet.spec).run(inputs)
    assert sqnr_db(expected, run_exactly(graph, inputs)) > sqnr_db(plain, expected) + 1


@pytest.mark.parametrize("kind", ON_CPU)
def test_the_form_for_tensorrt_has_the_same_numbers(kind: str, unet: Checkpoint, unet_graph: Graph) -> None:
    quantization, inputs = calibrated(unet, kind), inputs_for(unet)
    graph = quantized_graph(unet_graph, quantization, tensorrt=True)
    expected, found = run_exactly(quantized_graph(unet_graph, quantization), inputs), run_exactly(graph, inputs)
    assert sqnr_db(expected, found) > 60
    for node in graph.proto.graph.node:
        if node.op_type == "QuantizeLinear":
            zero = onnx.numpy_helper.to_array(next(t for t in graph.proto.graph.initializer if t.name == node.input[2]))
            assert zero.dtype.name in ("int8", "float8_e4m3fn") and float(zero) == 0
    casts = [node for node in graph.proto.graph.node if node.op_type == "Cast" and "weight" in node.name]
    assert casts == []


def test_nvfp4_stores_4_bits_and_the_graph_computes_its_weights() -> None:
    """On the CPU only weights are rounded, with codes and a table; TensorRT uses its own operator."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 24, bias=False)).eval(), torch.randn(2, 16, 64)
    graph = trace(model, lambda m, feed: (m(feed["sample"]),), {"sample": x}, ["out"], {"sample": {0: "batch"}})
    weight = model.get_parameter("0.weight")
    amax = weight_amax(weight, FORMATS["nvfp4"])
    quantization = Quantization("nvfp4", {"0.weight": amax, "0.input": torch.tensor(3.0)})
    rounded_weight = fake_nvfp4(weight.detach(), SimpleNamespace(amax=amax.reshape(-1, 1)))
    stored = quantized_graph(graph, quantization)
    np.testing.assert_allclose(run_exactly(stored, {"sample": x.numpy()}), x @ rounded_weight.T, atol=1e-5)
    assert bytes_by_precision(stored)["uint4"] == 64 * 24 / 2 and bytes_by_precision(stored)["float8_e4m3fn"] == 4 * 24

    native = load_all(quantized_graph(graph, quantization, tensorrt=True)).graph
    (numbers,) = (t for t in native.initializer if t.data_type == onnx.TensorProto.FLOAT4E2M1)
    assert [node.domain for node in native.node if node.op_type == "TRT_FP4DynamicQuantize"] == ["trt"]
    values = {t.name: onnx.numpy_helper.to_array(t) for t in native.initializer}
    scales = values["0.weight_shares"].astype(np.float32) * values["0.weight_top"]
    levels = onnx.numpy_helper.to_array(numbers).astype(np.float32)
    np.testing.assert_allclose(levels * np.repeat(scales, 16, 0), rounded_weight.numpy().T, atol=1e-7)


@pytest.mark.parametrize("kind", ["int4", "w4a8"])
def test_scales_of_another_width_are_rejected_by_layer(kind: str, unet: Checkpoint, unet_graph: Graph) -> None:
    quantization = calibrated(unet, kind, "mid_block.resnets.0.conv1".__eq__)
    amax = dict(quantization.amax)
    amax["mid_block.resnets.0.conv1.weight"] = amax["mid_block.resnets.0.conv1.weight"][:-1]
    with pytest.raises(InvalidInputError, match=r"layer 'mid_block\.resnets\.0\.conv1'.*was it pruned"):
        quantized_graph(unet_graph, Quantization(kind, amax))


@pytest.mark.parametrize("kind", ON_CPU)
def test_the_dry_runs_size_is_that_of_the_file(kind: str, unet: Checkpoint, unet_graph: Graph, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(
        f"stages: [quantize: {{format: {kind}, samples: 2, batch: 2, output_correction: false}}]\n"
    )
    recipe = Recipe.load(tmp_path / "r.yaml")
    after = dry_run(unet, recipe)["stages"][0]["after"]["bytes"]
    scales = quantize(unet, recipe.stages[0].config, Context(0, tmp_path / "work", unet)).quantization
    assert scales is not None
    counted = sum(bytes_by_precision(quantized_graph(unet_graph, scales)).values())
    assert counted == pytest.approx(after, rel=0.05)  # without shapes, zero points and scales of activations
