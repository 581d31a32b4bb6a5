"""export/passes/half_precision.py against torch, the float32 graph, and ONNX's type rules."""

from __future__ import annotations

import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.export.graph.model import Graph, Weight, load_all, save_graph, stub
from diffpress.export.graph.trace import trace
from diffpress.export.passes.half_precision import HALVES, PrecisionLoss, kept_modules, to_half
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import inputs_for, measured_scales, quantized_graph, run_exactly

TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
TORCH = {"fp16": torch.float16, "bf16": torch.bfloat16}

both = pytest.mark.parametrize("precision", HALVES)
needs_openvino = pytest.mark.skipif("openvino" not in available(), reason="needs openvino, which alone runs bf16")


def typed(graph: Graph) -> dict[str, int]:
    """Return the type of every tensor, by ONNX's strict inference, which rejects nodes that mix types."""
    proto = onnx.shape_inference.infer_shapes(load_all(graph), check_type=True, strict_mode=True).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*proto.input, *proto.output, *proto.value_info)}
    return types | {tensor.name: tensor.data_type for tensor in proto.initializer}


def traced(module: nn.Module, features: int = 8) -> Graph:
    torch.manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    example = {"sample": torch.randn(2, features)}
    return trace(module.eval(), lambda m, x: m(x["sample"]), example, ["out_sample"], {"sample": {0: "batch"}})


def run_rounded(graph: Graph, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """Return the output of ONNX's reference, which rounds every value of a half graph; CPU engines do not."""
    outputs = ReferenceEvaluator(load_all(graph)).run(None, inputs)
    assert isinstance(outputs, list)  # a dict only where intermediate results are requested
    return outputs[0]


# --- the full graph -------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_every_node_reads_and_writes_types_that_onnx_allows(
    model: str, precision: str, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(f"{model}_graph")
    half, _ = to_half(graph, precision)
    types = typed(half)
    onnx.checker.check_model(load_all(half))
    layers = [node for node in half.proto.graph.node if node.op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
    assert layers and all(types[name] == TYPES[precision] for node in layers for name in (*node.input, *node.output))


@both
def test_the_fp32_fallback_of_a_unet_is_float32(precision: str, unet_graph: Graph) -> None:
    half, _ = to_half(unet_graph, precision)
    types = typed(half)
    inside = {"InstanceNormalization", "Softmax", "Sin", "Cos"}
    found = [node for node in half.proto.graph.node if node.op_type in inside]
    assert {node.op_type for node in found} == inside
    assert all(types[name] == TensorProto.FLOAT for node in found for name in (*node.input, *node.output))
    assert all(types[n.output[0]] == TYPES[precision] for n in half.proto.graph.node if n.op_type == "Sigmoid")


@both
@pytest.mark.parametrize("model", ["unet", "everything"])
def test_inputs_outputs_and_nodes_keep_their_names_and_no_tensor_is_cast_twice(
    model: str, precision: str, request: pytest.FixtureRequest
) -> None:
    graph = request.getfixturevalue(f"{model}_graph")
    before = graph.proto.SerializeToString(deterministic=True)
    half, _ = to_half(graph, precision)
    old, new = graph.proto.graph, half.proto.graph
    assert list(new.input) == list(old.input) and list(new.output) == list(old.output)
    names = [node.name for node in old.node]
    assert [node.name for node in new.node if node.name in names] == names
    casts = [node for node in new.node if node.op_type == "Cast" and node.name not in names]
    assert len(casts) + len(names) == len(new.node)
    assert max(Counter((node.input[0], node.attribute[0].i) for node in casts).values()) == 1
    cast_outputs = {node.output[0] for node in casts}
    assert not cast_outputs.intersection(node.input[0] for node in casts), "a cast of a cast"
    assert graph.proto.SerializeToString(deterministic=True) == before


def test_casts_are_only_at_the_borders_of_the_fp32_fallback(unet_graph: Graph) -> None:
    half, _ = to_half(unet_graph, "fp16")
    kinds = Counter(node.op_type for node in half.proto.graph.node)
    old = Counter(node.op_type for node in unet_graph.proto.graph.node)
    # into and out of each; and the sample, the sinusoid, the output
    assert kinds["Cast"] - old["Cast"] <= 2 * (kinds["InstanceNormalization"] + kinds["Softmax"]) + 3


@both
@pytest.mark.parametrize("model", ["unet", "everything"])
def test_arithmetic_that_rounds_every_value_is_close_to_the_float_graph(
    model: str, precision: str, request: pytest.FixtureRequest
) -> None:
    inputs, graph = inputs_for(request.getfixturevalue(model)), request.getfixturevalue(f"{model}_graph")
    found = run_rounded(to_half(graph, precision)[0], inputs)
    # one rounding to 11 bits costs 66 to 72 dB, to 8 bits 48 to 54
    assert mean_sqnr_db(run_exactly(graph, inputs), found) > {"fp16": 48, "bf16": 30}[precision]


@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_fp16_is_close_to_the_float_graph_in_every_engine(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint, graph = request.getfixturevalue(model), request.getfixturevalue(f"{model}_graph")
    inputs = inputs_for(checkpoint)
    half, _ = to_half(graph, "fp16")
    save_graph(half, tmp_path / "h.onnx")
    expected = run_exactly(graph, inputs)
    assert mean_sqnr_db(expected, run_exactly(half, inputs)) > 52
    for engine in available():
        assert mean_sqnr_db(expected, load_engine(tmp_path / "h.onnx", engine, 1).run(inputs)) > 52


@needs_openvino
@pytest.mark.parametrize("model", ["unet", "everything", "wide"])
def test_bf16_is_close_to_the_float_graph_in_openvino(
    model: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    checkpoint, graph = request.getfixturevalue(model), request.getfixturevalue(f"{model}_graph")
    inputs = inputs_for(checkpoint)
    save_graph(to_half(graph, "bf16")[0], tmp_path / "h.onnx")
    found = load_engine(tmp_path / "h.onnx", "openvino", 1).run(inputs)
    assert 34 < mean_sqnr_db(run_exactly(graph, inputs), found) < 70


@both
def test_the_file_is_half_as_large(precision: str, wide_graph: Graph, tmp_path: Path) -> None:
    sizes = [save_graph(graph, tmp_path / "g.onnx") for graph in (to_half(wide_graph, precision)[0], wide_graph)]
    assert 0.49 < sizes[0] / sizes[1] < 0.52


# --- weights ---------------------------------------------------------------------------------------------------


@both
def test_weights_are_rounded_as_torch_rounds_them(precision: str, wide: Checkpoint, wide_graph: Graph) -> None:
    half, _ = to_half(wide_graph, precision)
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in load_all(half).graph.initializer}
    found = stored[f"heavy.weight.{HALVES[precision].name}"]
    expected = wide.model.get_parameter("heavy.weight").detach().to(TORCH[precision])
    np.testing.assert_array_equal(found.astype(np.float32), expected.float().numpy())


@both
def test_weights_are_written_one_at_a_time(
    precision: str, wide_graph: Graph, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffpress.export.graph.model.MAX_INLINE_BYTES", 1000)
    copies = 12
    side = 512
    names = [f"w{i}" for i in range(copies)]
    nodes = [onnx.helper.make_node("MatMul", [f"x{i}", name], [f"x{i + 1}"], name) for i, name in enumerate(names)]
    value = [onnx.helper.make_tensor_value_info(f"x{i}", TensorProto.FLOAT, ["b", side]) for i in (0, copies)]
    weight = Weight(np.dtype(np.float32), (side, side), lambda: np.full((side, side), 0.1, np.float32))
    stubs = [stub(name, weight) for name in names]
    inner = onnx.helper.make_graph(nodes, "g", value[:1], value[1:], stubs)
    proto = onnx.helper.make_model(inner, opset_imports=[onnx.helper.make_opsetid("", 18)])
    tracemalloc.start()
    half, _ = to_half(Graph(proto, dict.fromkeys(names, weight)), precision)
    save_graph(half, tmp_path / "g.onnx")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 4 * weight.nbytes
    assert (tmp_path / "g.onnx.data").stat().st_size >= copies * weight.nbytes // 2


def with_weight(value: float) -> Graph:
    """Return one product whose weight is all ones except for one `value`."""
    weight = np.ones((8, 8), np.float32)
    weight[2, 3] = value
    ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["b", 8]) for name in "xy"]
    node = onnx.helper.make_node("MatMul", ["x", "layer.weight"], ["y"], "layer")
    stored = [numpy_helper.from_array(weight, "layer.weight")]
    graph = onnx.helper.make_graph([node], "g", ends[:1], ends[1:], stored)
    return Graph(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]))


@pytest.mark.parametrize("value", [70000.0, -1e30])
def test_a_weight_that_overflows_is_rejected_by_name_and_accepted_in_bf16(value: float) -> None:
    graph = with_weight(value)
    with pytest.raises(
        InvalidInputError, match=r"weight 'layer.weight': .* exceeds the float16 maximum of 65504"
    ) as caught:
        to_half(graph, "fp16")
    assert "\n" not in str(caught.value) and "bf16" in str(caught.value)
    to_half(graph, "bf16")
    to_half(with_weight(65504.0), "fp16")


@pytest.mark.parametrize(
    ("value", "precision", "zero", "subnormal"),
    [
        (2e-8, "fp16", 1, 0),  # half of the smallest, 6e-8, is rounded to 0
        (-3e-8, "fp16", 0, 1),
        (-6e-5, "fp16", 0, 1),
        (6.2e-5, "fp16", 0, 0),
        (0.0, "fp16", 0, 0),
        (1e-20, "bf16", 0, 0),
    ],
)
def test_weights_below_the_range_are_counted(value: float, precision: str, zero: int, subnormal: int) -> None:
    assert to_half(with_weight(value), precision)[1] == PrecisionLoss(zero, subnormal, 64)
    assert (np.array(value, HALVES[precision]) == 0) == (zero == 1 or value == 0)


# --- what would overflow ---------------------------------------------------------------------------------------


class LoudNorm(nn.Module):
    """Activations of about 2000, whose squares do not fit float16."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(1000 * self.first(sample)))


def test_a_norm_of_large_activations_works_where_torchs_half_precision_fails() -> None:
    module = LoudNorm()
    graph = traced(module)
    sample = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    expected = run_exactly(graph, {"sample": sample.numpy()})
    with torch.no_grad():
        inside = 1000 * module.first(sample)
    assert 255.9**2 < 65504 < float(inside.square().max()) and float(inside.abs().max()) < 65504
    found = run_rounded(to_half(graph, "fp16")[0], {"sample": sample.numpy()})
    assert mean_sqnr_db(expected, found) > 50
    naive = inside.half() * torch.rsqrt(inside.half().square().mean(-1, keepdim=True) + 1e-6)
    assert not naive.any(), "the test's activations are too small to overflow"


class Gated(nn.Module):
    """Feed-forward layer as in T5: the output of `wo` exceeds float16, and goes through a sum into a norm."""

    _keep_in_fp32_modules = ["wo"]

    def __init__(self) -> None:
        super().__init__()
        self.wi, self.wo, self.norm, self.last = nn.Linear(8, 256), nn.Linear(256, 8), nn.RMSNorm(8), nn.Linear(8, 8)

    def forward(self, sample: torch.Tensor) -> torch.Tensor:
        return self.last(self.norm(sample + self.wo(5000 * self.wi(sample))))


def test_layers_that_the_models_authors_keep_in_float32_do_not_overflow() -> None:
    module = Gated()
    graph = traced(module)
    sample = np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32)
    expected = run_exactly(graph, {"sample": sample})
    assert kept_modules(module, "fp16") == ("wo",)
    assert kept_modules(module, "bf16") == () == kept_modules(nn.ReLU(), "fp16")
    kept = run_rounded(to_half(graph, "fp16", kept_modules(module, "fp16"))[0], {"sample": sample})
    assert mean_sqnr_db(expected, kept) > 50
    with np.errstate(all="ignore"):
        assert not np.isfinite(run_rounded(to_half(graph, "fp16")[0], {"sample": sample})).all()


# --- quantized graphs ------------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("tensorrt", [False, True])
def test_a_quantized_graph_has_scales_in_half_precision(
    precision: str, tensorrt: bool, unet: Checkpoint, unet_graph: Graph
) -> None:
    rounded = quantized_graph(unet_graph, measured_scales(unet), tensorrt)
    half, _ = to_half(rounded, precision)
    types = typed(half)
    pairs = [node for node in half.proto.graph.node if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    assert pairs and all(types[node.input[1]] == TYPES[precision] for node in pairs)
    integers = {tensor.name: tensor.data_type for tensor in rounded.proto.graph.initializer if tensor.data_type == 3}
    assert integers and integers.items() <= types.items()
    if precision == "fp16":
        inputs = inputs_for(unet)
        assert mean_sqnr_db(run_exactly(rounded, inputs), run_exactly(half, inputs)) > 28


# --- errors ----------------------------------------------------------------------------------------------------


def test_an_unknown_precision_is_rejected(wide_graph: Graph) -> None:
    with pytest.raises(InvalidInputError, match="unknown half precision 'fp8'"):
        to_half(wide_graph, "fp8")


def test_a_graph_with_branches_is_rejected_with_the_nodes_name() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <then_branch = t () => (float[2] a) { a = Identity(x) },
                    else_branch = e () => (float[2] b) { b = Neg(x) }>
    }"""
    model = onnx.parser.parse_model(text)
    model.graph.node[0].name = "fork"
    with pytest.raises(InvalidInputError, match="node 'fork': If cannot be converted to half precision"):
        to_half(Graph(model), "fp16")


def test_constants_in_attributes_and_target_types_of_casts_are_converted() -> None:
    text = """<ir_version: 8, opset_import: ["" : 18]> g (float[b, 1] x) => (float[b, 1] y) <float[1, 1] w = {0.5}> {
        a = MatMul(x, w)
        c = Constant <value = float {2}> ()
        big = Greater(a, c)
        mask = Cast <to = 1> (big)
        y = Mul(a, mask)
    }"""
    half, _ = to_half(Graph(onnx.parser.parse_model(text)), "fp16")
    typed(half)
    x = np.arange(8, dtype=np.float32)[:, None]
    np.testing.assert_array_equal(run_exactly(half, {"x": x}), np.where(x > 4, x / 2, 0))
