"""runtime/engines: the backends agree, report the precision of executed layers, and reject broken graphs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import ENGINES, available, load_engine, macs, open_engine
from diffpress.runtime.engines.precision_report import Product, precision_report_of
from diffpress.runtime.errors import InvalidInputError, MissingDependencyError
from diffpress.runtime.network_inputs import dummy_inputs
from tests.runtime.small_graphs import sample_inputs

ENGINE_NAMES = sorted(ENGINES)
CONV, PRODUCT, GEMM = (
    2 * 16 * 8 * 8 * 8 * 9,
    2 * 8 * 8 * 16 * 16,
    2 * 16 * 4,
)  # MACs of the graph below, batch of 2


@pytest.fixture(params=ENGINE_NAMES)
def name(request: pytest.FixtureRequest) -> str:
    if request.param not in available():
        pytest.skip(f"{request.param} cannot run on this machine")
    return str(request.param)


def test_a_float_graph_has_no_integer_macs(name: str, float_graph: Path) -> None:
    assert load_engine(float_graph, name).integer_mac_share(sample_inputs()) == 0.0


def test_a_quantized_graph_runs_nearly_all_products_on_integers(
    name: str, quantized_graph: Callable[..., Path]
) -> None:
    share = load_engine(quantized_graph("Conv", "MatMul", "Gemm"), name).integer_mac_share(sample_inputs())
    assert share is not None and 0.9 < share <= 1.0


@pytest.mark.parametrize(
    ("kinds", "integer"), [(("Conv",), CONV), (("MatMul",), PRODUCT), (("Conv", "MatMul"), CONV + PRODUCT)]
)
def test_the_integer_mac_share_is_that_of_the_quantized_layers(
    name: str, quantized_graph: Callable[..., Path], kinds: tuple[str, ...], integer: int
) -> None:
    share = load_engine(quantized_graph(*kinds), name).integer_mac_share(sample_inputs())
    assert share == pytest.approx(integer / (CONV + PRODUCT + GEMM), abs=1e-9)


def test_the_integer_mac_share_does_not_depend_on_earlier_runs(name: str, quantized_graph: Callable[..., Path]) -> None:
    engine = load_engine(quantized_graph("Conv"), name)
    shares = [engine.integer_mac_share({"sample": np.zeros((n, 8, 8, 8), np.float32)}) for n in (2, 5, 1, 2)]
    assert shares == pytest.approx([CONV / (CONV + PRODUCT + GEMM)] * 4, abs=1e-9)


def test_reading_the_integer_mac_share_leaves_no_files_and_does_not_change_results(
    name: str, quantized_graph: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    engine = load_engine(quantized_graph("Conv"), name)
    monkeypatch.chdir(tmp_path)
    before = engine.run(sample_inputs())
    engine.integer_mac_share(sample_inputs())
    assert list(tmp_path.iterdir()) == [] and np.array_equal(engine.run(sample_inputs()), before)


@pytest.fixture(scope="module")
def mixed_graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sample [N, 8, 8, 8] -> convolutions a, b, c, transposed convolution d, product e; all but b have Q/DQ pairs."""
    onnx = pytest.importorskip("onnx")
    helper, rng = onnx.helper, np.random.default_rng(0)
    constants: list[object] = []
    nodes: list[Any] = []

    def constant(name: str, value: np.ndarray) -> str:
        constants.append(onnx.numpy_helper.from_array(value, name))
        return name

    def node(kind: str, name: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, inputs, [f"{name}_out"], name, **attributes))
        return f"{name}_out"

    scale, zero = constant("scale", np.array(0.05, np.float32)), constant("zero", np.zeros((), np.int8))

    def pair(tensor: str, name: str) -> str:
        rounded = node("QuantizeLinear", f"{name}/Q", tensor, scale, zero)
        return node("DequantizeLinear", f"{name}/DQ", rounded, scale, zero)

    def integers(name: str, *shape: int) -> str:
        stored = constant(name, rng.integers(-60, 60, shape, np.int8))
        return node("DequantizeLinear", f"{name}/DQ", stored, scale, zero)

    bias = constant("bias", np.ones(16, np.float32))
    x = node("Conv", "net.a", pair("sample", "net.a.input"), integers("wa", 16, 8, 3, 3), bias, pads=[1] * 4)
    filters = constant("wb", rng.standard_normal((16, 16, 3, 3), np.float32))
    x = node("Tanh", "rounded", node("Conv", "net.b", pair(x, "net.a.output"), filters, bias, pads=[1] * 4))
    x = node("Conv", "net.c", pair(x, "net.c.input"), integers("wc", 16, 16, 1, 1), bias)
    x = pair(x, "net.c.output")
    x = node("Tanh", "tanh", node("ConvTranspose", "net.d", x, integers("wd", 16, 16, 2, 2), bias, strides=[2, 2]))
    node("Tanh", "last", node("MatMul", "net.e", pair(x, "net.e.input"), integers("we", 16, 4)))
    nodes[-1].output[0] = "out_sample"
    value = helper.make_tensor_value_info
    inputs = [value("sample", onnx.TensorProto.FLOAT, ["batch", 8, 8, 8])]
    outputs = [value("out_sample", onnx.TensorProto.FLOAT, ["batch", 16, 16, 4])]
    graph = helper.make_graph(nodes, "mixed", inputs, outputs, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path_factory.mktemp("graphs") / "mixed.onnx"
    onnx.save(model, path)
    return path


# its MACs: 2 * 8 * 8 pixels, then four times as many; e multiplies rows of 16 columns, one per pixel
B, D = 128 * 16 * 16 * 9, 128 * 16 * 16 * 4
MIXED = 128 * 16 * 8 * 9 + B + 128 * 16 * 16 + D + 2 * 16 * 16 * 16 * 4


def test_the_precision_report_names_float_layers_and_fallbacks(name: str, mixed_graph: Path) -> None:
    precision_report = load_engine(mixed_graph, name).precision_report(
        sample_inputs(), quantized_layers=["net.a", "net.c", "net.d", "net.e"]
    )
    in_float = {"net.b": B / MIXED}
    if name == "onnxruntime":  # it has no integer kernel for d; OpenVINO does
        in_float |= {"net.d": D / MIXED}
        assert precision_report.fallbacks == {"net.d": "no integer kernel for transposed convolutions"}
    else:
        assert precision_report.fallbacks == {}
    assert precision_report.float_layers == pytest.approx(in_float) and list(precision_report.float_layers) == list(
        in_float
    )
    assert precision_report.integer_mac_share == pytest.approx(1 - sum(in_float.values()))


def test_a_quantized_layer_that_ran_in_float_is_a_fallback(name: str, mixed_graph: Path) -> None:
    precision_report = load_engine(mixed_graph, name).precision_report(
        sample_inputs(), quantized_layers=["net.b", "net.c", "net.f"]
    )
    reason = {"onnxruntime": "no integer convolution with a float result", "openvino": "no integer kernel matched"}
    assert precision_report.fallbacks == {"net.b": reason[name], "net.f": "not among the layers that ran"}


def test_attention_inside_a_float_subgraph_is_reported_as_such(tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("openvino")
    helper = onnx.helper
    nodes = [
        helper.make_node("MatMul", ["q", "k"], ["scores"], "scores"),
        helper.make_node("Softmax", ["scores"], ["weights"], "softmax", axis=-1),
        helper.make_node("MatMul", ["weights", "v"], ["attended"], "mixed"),
        helper.make_node("Transpose", ["attended"], ["out"], "heads", perm=[0, 2, 1, 3]),
    ]
    shapes = {"q": [1, 2, 32, 8], "k": [1, 2, 8, 32], "v": [1, 2, 32, 8], "out": [1, 32, 2, 8]}
    values = [helper.make_tensor_value_info(key, onnx.TensorProto.FLOAT, shape) for key, shape in shapes.items()]
    graph = helper.make_graph(nodes, "attention", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "attention.onnx")
    inputs = {key: np.ones(shapes[key], np.float32) for key in ("q", "k", "v")}
    precision_report = load_engine(tmp_path / "attention.onnx", "openvino").precision_report(
        inputs, quantized_layers=["scores", "mixed"]
    )
    assert precision_report.fallbacks == dict.fromkeys(["mixed", "scores"], "fused into a float subgraph")
    assert precision_report.float_layers == {"mixed": 0.5, "scores": 0.5}


def test_the_precision_report_of_given_products() -> None:
    """A layer used twice counts once, and is a fallback if one use is; operations without MACs are ignored."""
    products = [
        Product("proj", 30, True),
        Product("proj#2", 20, False, "why"),
        Product("big", 40, False),
        Product("q", 10, True),
        Product("relu", 0, False),
    ]
    precision_report = precision_report_of(products, quantized_layers=["q", "proj", "gone", "big"])
    assert precision_report.integer_mac_share == pytest.approx(0.4)
    assert list(precision_report.float_layers.items()) == [("big", 0.4), ("proj", 0.2)]
    assert list(precision_report.fallbacks) == ["big", "proj", "gone"]
    assert (precision_report.fallbacks["proj"], precision_report.fallbacks["gone"]) == (
        "why",
        "not among the layers that ran",
    )
    assert precision_report_of([], []) == (0.0, {}, {})


def test_engines_agree_on_a_float_graph(float_graph: Path) -> None:
    outputs = [load_engine(float_graph, name).run(sample_inputs()) for name in available()]
    assert all(np.abs(output - outputs[0]).max() < 1e-5 for output in outputs)


def test_any_batch_size_runs(name: str, tiny: Path) -> None:
    bundle = load_bundle(tiny)
    engine = open_engine(bundle, name)
    feeds = {batch: dummy_inputs(engine, bundle.spec, batch) for batch in (1, 2, 3, 4, 5, 6)}
    first = {batch: engine.run(feed) for batch, feed in feeds.items()}
    again = {batch: engine.run({key: value * 1 for key, value in feed.items()}) for batch, feed in feeds.items()}
    assert all(np.array_equal(first[batch], again[batch]) and len(first[batch]) == batch for batch in feeds)
    # batches start with the same noise, so their common samples agree
    assert np.abs(first[6][:3] - first[3]).max() < 1e-5


def test_an_output_is_not_overwritten_by_the_next_run(name: str, float_graph: Path) -> None:
    engine = load_engine(float_graph, name)
    first = engine.run(sample_inputs(0))
    kept = first.copy()
    second = engine.run(sample_inputs(1))
    assert np.array_equal(first, kept) and not np.array_equal(first, second)


def test_run_all_returns_every_output_by_name_and_run_the_first(name: str, tmp_path: Path) -> None:
    onnx = pytest.importorskip("onnx")
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    nodes = [helper.make_node("Neg", ["x"], ["z_first"]), helper.make_node("Abs", ["x"], ["a_second"])]
    outputs = [helper.make_tensor_value_info(out, kind, ["batch", 3]) for out in ("z_first", "a_second")]
    graph = helper.make_graph(nodes, "two", [helper.make_tensor_value_info("x", kind, ["batch", 3])], outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.save(model, tmp_path / "two.onnx")
    engine = load_engine(tmp_path / "two.onnx", name)
    x = np.array([[1, -2, 3], [-4, 5, -6]], np.float32)
    found = engine.run_all({"x": x})
    assert list(found) == ["z_first", "a_second"]
    engine.run_all({"x": 9 * x})  # must not overwrite the outputs
    assert np.array_equal(found["z_first"], -x) and np.array_equal(found["a_second"], np.abs(x))
    assert np.array_equal(engine.run({"x": x}), -x)


def test_inputs_maps_names_to_dtypes(name: str, tiny: Path) -> None:
    engine = open_engine(load_bundle(tiny), name, threads=1)
    assert engine.inputs == {"sample": np.float32, "timestep": np.int64, "class_labels": np.int64}
    assert engine.name == name


def test_the_default_engine_is_the_first_installed_one(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert open_engine(load_bundle(tiny)).name == available()[0]
    monkeypatch.setattr(ENGINES["openvino"], "missing", lambda: "openvino")
    assert open_engine(load_bundle(tiny)).name == "onnxruntime"


def test_a_missing_package_names_the_extra_to_install(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ENGINES["openvino"], "missing", lambda: "openvino")
    with pytest.raises(MissingDependencyError, match=r"pip install 'diffpress\[openvino\]'"):
        open_engine(load_bundle(tiny), "openvino")
    monkeypatch.setattr(ENGINES["onnxruntime"], "missing", lambda: "onnxruntime")
    with pytest.raises(MissingDependencyError, match=r"pip install diffpress$"):
        open_engine(load_bundle(tiny), "onnxruntime")


@pytest.mark.parametrize(
    ("options", "message"),
    [({"name": "onxruntime"}, "did you mean 'onnxruntime'"), ({"threads": 0}, "0 threads")],
)
def test_unknown_engines_and_invalid_threads_raise(tiny: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        open_engine(load_bundle(tiny), **options)


@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"not a graph", lambda b: b"\x00" * 64]
)
def test_a_broken_graph_raises_a_one_line_error(
    name: str, tiny: Path, tmp_path: Path, damage: Callable[[bytes], bytes], capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "broken.onnx"
    path.write_bytes(damage((tiny / "denoiser.onnx").read_bytes()))
    with pytest.raises(InvalidInputError) as caught:  # noqa: PT012  # fails at load or at run, by engine
        engine = load_engine(path, name)
        engine.run(dummy_inputs(engine, load_bundle(tiny).spec, 1))
    assert str(path) in str(caught.value) and "export it again" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_inputs_of_the_wrong_shape_raise_a_one_line_error(name: str, float_graph: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"float\.onnx") as caught:
        load_engine(float_graph, name).run({"sample": np.zeros((1, 5, 8, 8), np.float32)})
    assert "\n" not in str(caught.value)


def test_a_missing_graph_raises(name: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="no such file"):
        load_engine(tmp_path / "none.onnx", name)


def test_macs_follow_from_the_shapes() -> None:
    assert macs.convolution([2, 16, 8, 8], [16, 8, 3, 3]) == CONV
    assert macs.convolution([1, 8, 4, 4], [8, 1, 3, 3]) == 8 * 16 * 9  # depthwise
    assert macs.convolution([1, 8, 4, 4], [8, 1, 1, 3, 3]) == 8 * 16 * 9  # the same, groups written out
    assert macs.transposed_convolution([1, 8, 4, 4], [8, 3, 2, 2]) == 8 * 16 * 3 * 4
    assert macs.product([2, 64, 16], [2, 64, 16]) == PRODUCT
    assert macs.product([2, 16, 64], [2, 64, 16]) == PRODUCT  # A stored transposed
    assert macs.product([16, 64], [16]) == macs.product([16], [64]) == 16 * 64  # B or A is a vector
    assert macs.product([16], []) == 16
    assert macs.attention([1, 4, 49, 32], [1, 4, 49, 32], [1, 4, 49, 32]) == 2 * 4 * 49 * 49 * 32
    assert macs.attention([1, 49, 128], [1, 49, 128], [1, 49, 128]) == 2 * 4 * 49 * 49 * 32


def test_every_kernel_has_a_time_and_the_name_of_its_node_or_tensor(name: str, float_graph: Path) -> None:
    engine = load_engine(float_graph, name, 1)
    kernels = engine.kernel_times(sample_inputs(0), runs=2)
    found = {name_of_node for kernel in kernels for name_of_node in kernel.names}
    assert found & {"conv", "c"} and found & {"matmul", "m"} and found & {"gemm", "out_sample"}
    assert all(kernel.ms >= 0 for kernel in kernels) and 0 < sum(kernel.ms for kernel in kernels) < 1000
