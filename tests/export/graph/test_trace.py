"""export/graph/trace.py: tracing a module without copying its weights, and the names of nodes and axes."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import nn

from diffpress.export.graph.model import Graph, load_all, save_graph
from diffpress.export.graph.trace import trace
from diffpress.runtime.errors import InvalidInputError

AXES = {"pixels": {0: "batch", 2: "height", 3: "width"}, "text": {0: "batch", 1: "sequence"}}


class Latent(nn.Module):
    """Typical contents of a text-to-image network.

    A spatial input of any size, tokens of any number, tied weights, small and large buffers, persistent or not, one of
    integers, and weights above and below the size that the optimizer folds.
    """

    table: torch.Tensor
    shift: torch.Tensor
    positions: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(4, 16, 3, padding=1), nn.GroupNorm(4, 16)
        self.batch_norm = nn.BatchNorm2d(16)
        self.query, self.key, self.value = nn.Linear(16, 160), nn.Linear(24, 160, bias=False), nn.Linear(24, 160)
        self.mix, self.tied, self.out = nn.Linear(160, 160), nn.Linear(160, 160), nn.Linear(160, 16, bias=False)
        self.tied.weight = self.mix.weight
        self.last = nn.Conv2d(16, 4, 3, padding=1)
        self.gain = nn.Parameter(torch.randn(16, 1, 1))
        self.register_buffer("table", torch.randn(300, 160), persistent=False)
        self.register_buffer("shift", torch.randn(160))
        self.register_buffer("positions", torch.arange(7, 300))
        assert self.batch_norm.running_mean is not None
        with torch.no_grad():
            self.batch_norm.running_mean.normal_()

    def forward(self, pixels: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.batch_norm(self.first(pixels)) * self.gain
        tokens = self.norm(x).flatten(2).transpose(1, 2)
        q, k, v = self.query(tokens), self.key(text), self.value(text)
        k = k + self.table[self.positions[: text.shape[1]]] + self.shift
        attended = nn.functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        attended = self.out(self.tied(torch.tanh(self.mix(attended))))
        x = x + attended.transpose(1, 2).reshape(x.shape)
        return nn.functional.interpolate(self.last(x), scale_factor=2.0), attended


def forward(model: nn.Module, inputs: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    return model(inputs["pixels"], inputs["text"])


def examples(batch: int = 2, height: int = 6, width: int = 8, sequence: int = 5) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(batch + height)
    shapes = {"pixels": (batch, 4, height, width), "text": (batch, sequence, 24)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def latent(dtype: torch.dtype = torch.float32) -> Latent:
    torch.manual_seed(0)
    return Latent().to(dtype)


def traced(model: nn.Module) -> Graph:
    return trace(model, forward, examples(), ["images", "features"], AXES)


@pytest.fixture(scope="module")
def model() -> Latent:
    return latent().train()


@pytest.fixture(scope="module")
def graph(model: Latent) -> Graph:
    return traced(model)


def run(graph: Graph, inputs: dict[str, torch.Tensor]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(load_all(graph).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {name: value.numpy() for name, value in inputs.items()})


def check(graph: Graph, model: nn.Module, inputs: dict[str, torch.Tensor], atol: float) -> None:
    with torch.no_grad():
        expected = forward(model.eval(), inputs)
    for actual, reference in zip(run(graph, inputs), expected, strict=True):
        np.testing.assert_allclose(actual, reference.numpy(), atol=atol)


@pytest.mark.parametrize("sizes", [(1, 6, 8, 5), (3, 10, 4, 9)])
def test_every_named_axis_accepts_other_sizes(sizes: tuple[int, int, int, int], graph: Graph) -> None:
    check(graph, latent(), examples(*sizes), atol=1e-5)


def test_input_axes_have_their_names_and_output_axes_their_formulas(graph: Graph) -> None:
    values = (*graph.proto.graph.input, *graph.proto.graph.output)
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in values}
    assert shapes["pixels"] == ["batch", 4, "height", "width"]
    assert shapes["text"] == ["batch", "sequence", 24]
    assert shapes["images"] == ["batch", 4, "2 * height", "2 * width"]
    assert shapes["features"][0] == "batch" and shapes["features"][2] == 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_module_gives_a_float32_graph_of_the_same_weights(dtype: torch.dtype, graph: Graph) -> None:
    model = latent(dtype)
    half = traced(model)
    assert [node.op_type for node in half.proto.graph.node] == [node.op_type for node in graph.proto.graph.node]
    types = {t.data_type for t in load_all(half).graph.initializer}
    assert types <= {onnx.TensorProto.FLOAT, onnx.TensorProto.INT64, onnx.TensorProto.BOOL}
    assert next(model.parameters()).dtype == dtype
    check(half, model.float(), examples(), atol=1e-5)


def test_weights_are_the_modules_own_tensors_and_not_copies(model: Latent, graph: Graph) -> None:
    assert {"first.weight", "query.weight", "table"} <= set(graph.weights)
    for name in ("first.weight", "query.weight", "table"):
        tensor = model.get_parameter(name) if name != "table" else model.table
        assert np.shares_memory(graph.weights[name].read(), tensor.detach().numpy())
    held = sum(len(tensor.raw_data) for tensor in graph.proto.graph.initializer)
    assert held < 10_000 < sum(weight.nbytes for weight in graph.weights.values())


def test_every_layer_is_found_and_no_transpose_precedes_its_weight(graph: Graph) -> None:
    operators = {node.name: node.op_type for node in graph.proto.graph.node}
    linear = ["query", "key", "value", "mix", "tied", "out"]
    assert {name: operators.get(name) for name in linear} == dict.fromkeys(linear, "MatMul")
    assert operators["first"] == operators["last"] == "Conv"
    transposed = {node.input[0] for node in graph.proto.graph.node if node.op_type == "Transpose"}
    assert not transposed & set(graph.weights)


def test_tied_weights_are_stored_once(graph: Graph) -> None:
    assert len({"mix.weight", "tied.weight"} & set(graph.weights)) == 1


def test_a_weight_read_both_transposed_and_not_keeps_its_transpose() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layer(x) @ self.layer.weight

    torch.manual_seed(0)
    model, inputs = Both(), {"x": torch.randn(2, 3, 6)}
    graph = trace(model, lambda m, feed: m(feed["x"]), inputs, ["y"], {"x": {0: "batch"}})
    found = run(graph, {"x": torch.ones(5, 3, 6)})[0]
    np.testing.assert_allclose(found, model(torch.ones(5, 3, 6)).detach(), atol=1e-6)


def test_tracing_does_not_change_the_module_or_the_logging(model: Latent, graph: Graph) -> None:
    before = latent().state_dict()
    assert model.training and model.first.training and logging.root.manager.disable == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_the_graph_writes_the_same_bytes_when_it_is_traced_again(graph: Graph, tmp_path: Path) -> None:
    for name, one in (("a", graph), ("b", traced(latent()))):
        save_graph(one, tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_initializers_have_the_values_of_the_module(model: Latent, graph: Graph) -> None:
    stored = {t.name: numpy_helper.to_array(t) for t in load_all(graph).graph.initializer}
    np.testing.assert_array_equal(stored["last.weight"], model.last.weight.detach())
    np.testing.assert_array_equal(stored["key.weight"], model.key.weight.detach().T)
    np.testing.assert_array_equal(stored["last.bias"], model.get_parameter("last.bias").detach())


def test_a_module_that_cannot_be_traced_is_named_in_one_line() -> None:
    class Branching(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * 2 if x.sum() > 0 else x

    with pytest.raises(InvalidInputError, match="Branching: cannot be traced") as caught:
        trace(Branching(), lambda m, feed: m(feed["x"]), {"x": torch.ones(2)}, ["y"], {})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("axis", ["batch", "steps"])
def test_a_module_that_fixes_a_size_is_told_which_input_and_axis(axis: str) -> None:
    class OfTwo(nn.Module):
        def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return x * t.view(2, 1)

    inputs = {"x": torch.randn(2, 3), "t": torch.ones(2)}
    axes = {"x": {0: "batch"}, "t": {0: axis}}
    message = rf"fixes axis 0 of input 'x' \(batch\) to 2 and axis 0 of input 't' \({axis}\) to 2.* own timestep"
    with pytest.raises(InvalidInputError, match=message):
        trace(OfTwo(), lambda m, feed: m(feed["x"], feed["t"]), inputs, ["y"], axes)


@pytest.mark.parametrize("small", [1e-15, 1e-8, -1e-9, 1e-6])
def test_a_constant_near_zero_or_one_is_kept(small: float) -> None:
    """The optimizer takes 1e-8 for 0 and 1.000001 for 1: 0 / (0 + 1e-15) became NaN."""

    class Divided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([torch.relu(x) / (torch.relu(x) + small), x * (1.0 + small), x - small * 1e-3])

    x = torch.tensor([[-1.0, 0.0, 1e-9, 2.0]] * 2)
    graph = trace(Divided(), lambda m, feed: m(feed["x"]), {"x": x}, ["y"], {"x": {0: "batch"}})
    np.testing.assert_array_equal(run(graph, {"x": x})[0], Divided()(x))


class Aliased(nn.Module):
    """A layer that is registered under three names."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.alias, self.chain = self.layer, nn.Sequential(self.layer, nn.ReLU(), self.layer)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.chain(self.alias(x))


def test_a_layer_with_several_names_has_its_first_name_at_every_use() -> None:
    graph = trace(Aliased(), lambda m, feed: m(feed["x"]), {"x": torch.randn(2, 4)}, ["y"], {"x": {0: "batch"}})
    assert [node.name for node in graph.proto.graph.node if node.op_type == "Gemm"] == ["layer", "layer#2", "layer#3"]


def test_torchs_transformer_layer_is_traced_module_by_module() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    graph = trace(layer, lambda m, feed: m(feed["x"]), {"x": x}, ["y"], {"x": {0: "batch"}})
    assert {"linear1", "linear2"} <= {node.name for node in graph.proto.graph.node}
    np.testing.assert_allclose(run(graph, {"x": torch.cat([x, x])})[0][2:], layer(x).detach(), atol=1e-5)
    assert torch.backends.mha.get_fastpath_enabled()


class Sums(nn.Module):
    """Blocks that end in a sum, in a divided sum or in another operation, and one that is called twice."""

    class Block(nn.Module):
        def __init__(self, end: str) -> None:
            super().__init__()
            self.conv, self.end = nn.Conv2d(4, 4, 1), end

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.conv(torch.tanh(x + 1.0))  # the inner sum is read inside
            return {"sum": x, "divided": x / 1.5, "product": x * torch.sigmoid(x)}[self.end]

    def __init__(self) -> None:
        super().__init__()
        self.sum, self.divided, self.product = Sums.Block("sum"), Sums.Block("divided"), Sums.Block("product")
        self.twice, self.last = Sums.Block("sum"), Sums.Block("sum")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.product(self.divided(self.sum(x)))
        return self.last(self.twice(torch.tanh(self.twice(x))) + 2.0)


def test_the_final_sum_of_a_module_has_the_modules_name() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 4, 3, 3)}
    graph = trace(Sums().eval(), lambda model, feed: model(feed["x"]), inputs, ["y"], {"x": {0: "batch"}}).proto.graph
    named = {node.name: node for node in graph.node}
    assert named["sum"].op_type == "Add" and named["divided"].op_type == "Div" and named["last"].op_type == "Add"
    assert named["last"].output[0] == "y" and "product" not in named and "twice" not in named
    readers = [node.op_type for node in graph.node if named["sum"].output[0] in node.input]
    assert set(readers) == {"Add"}  # the next block's two
