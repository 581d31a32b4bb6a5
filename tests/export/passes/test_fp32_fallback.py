"""export/passes/fp32_fallback.py on graphs small enough to see which nodes must be float32."""

from __future__ import annotations

from collections.abc import Sequence

import onnx

from diffpress.export.graph.model import Graph
from diffpress.export.passes.fp32_fallback import fp32_nodes
from diffpress.export.passes.half_precision import to_half

HEAD = '<ir_version: 8, opset_import: ["" : 18]>'


def inside(body: str, keep: tuple[str, ...] = (), names: Sequence[str] = ()) -> str:
    """Return the outputs of the float32 nodes in order; `names` are the names of the first nodes."""
    model = onnx.parser.parse_model(f"{HEAD} {body}")
    for node, name in zip(model.graph.node, names, strict=False):
        node.name = name
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.input, *inferred.output, *inferred.value_info)
    floats = {value.name for value in values if value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    floats |= {tensor.name for tensor in inferred.initializer if tensor.data_type == onnx.TensorProto.FLOAT}
    found = fp32_nodes(inferred, floats, keep=keep)
    to_half(Graph(model), "fp16", keep)  # the selection gives a valid graph
    return " ".join(inferred.node[index].output[0] for index in sorted(found))


# every graph starts with a layer, because nodes before the first one are float32 anyway
LAYER = "x = MatMul(sample, w)"
W = f"float[4, 4] w = {{{', '.join(['0.5'] * 16)}}}"
SIGNATURE = f"(float[b, 4] sample) => (float[b, 4] y) <{W}"


def test_a_decomposed_norm_is_float32_up_to_and_including_its_scale() -> None:
    body = f"""g {SIGNATURE}, float two = {{2}}, float eps = {{1e-6}}, float[4] gain = {{1, 1, 1, 1}},
        int64[1] last = {{1}}> {{
        {LAYER}
        square = Pow(x, two)
        mean = ReduceMean(square, last)
        safe = Add(mean, eps)
        root = Sqrt(safe)
        inverse = Reciprocal(root)
        normed = Mul(x, inverse)
        scaled = Mul(normed, gain)
        y = MatMul(scaled, w)
    }}"""
    assert inside(body) == "square mean safe root inverse normed scaled"


def test_activations_and_sums_of_layers_are_in_half_precision() -> None:
    body = f"""g {SIGNATURE}, float[4] scale = {{1, 1, 1, 1}}, float[4] shift = {{0, 0, 0, 0}}> {{
        {LAYER}
        normed = LayerNormalization(x, scale, shift)
        gate = Sigmoid(normed)
        silu = Mul(normed, gate)
        z = MatMul(silu, w)
        y = Add(x, z)
    }}"""
    assert inside(body) == "normed"


def test_a_square_is_dangerous_however_it_is_written() -> None:
    assert inside(f"g {SIGNATURE}> {{ {LAYER} square = Mul(x, x) y = MatMul(square, w) }}") == "square"
    assert inside(f"g {SIGNATURE}> {{ {LAYER} twice = Mul(x, w) y = MatMul(twice, w) }}") == ""


def test_masked_scores_are_float32_back_to_the_preceding_product() -> None:
    body = f"""g {SIGNATURE}, float scale = {{0.125}}, float[4] mask = {{0, 0, 0, -3e38}}> {{
        {LAYER}
        scores = Mul(x, scale)
        masked = Add(scores, mask)
        weights = Softmax(masked)
        y = MatMul(weights, w)
    }}"""
    assert inside(body) == "scores masked weights"


def test_nodes_before_any_layer_are_float32_and_an_embedding_is_a_layer() -> None:
    body = f"""g (float[b, 4] sample, int64[b, 1] timestep) => (float[b, 4] y)
        <{W}, float rate = {{0.01}}, int64[1] axis = {{1}}> {{
        time = Cast <to = 1> (timestep)
        angle = Mul(time, rate)
        wave = Sin(angle)
        moved = Add(sample, angle)
        x = MatMul(moved, w)
        index = Squeeze(timestep, axis)
        label = Gather(w, index)
        labeled = Add(x, label)
        y = Mul(labeled, wave)
    }}"""
    assert inside(body) == "time angle wave moved index"


def test_layers_are_kept_by_the_name_of_a_module_that_contains_them() -> None:
    body = f"g {SIGNATURE}> {{ a = MatMul(sample, w) b = MatMul(a, w) y = MatMul(b, w) }}"
    names = ["encoder.block.0.wo", "encoder.block.0.two", "wo.gate"]
    assert inside(body, keep=("wo",), names=names) == "a y"
    assert inside(body, keep=("block.0",), names=names) == "a b"
    assert inside(body, names=names) == ""


def test_sums_between_float32_nodes_are_float32() -> None:
    """T5's residual stream after a kept layer must not pass through float16 on its way to a norm."""
    body = f"""g {SIGNATURE}, float[4] scale = {{1, 1, 1, 1}}> {{
        a = MatMul(sample, w)
        b = MatMul(a, w)
        stream = Add(a, b)
        c = MatMul(a, w)
        later = Add(stream, c)
        normed = LayerNormalization(later, scale)
        y = MatMul(normed, w)
    }}"""
    names = ["first", "wo", "", "second"]
    assert inside(body, keep=("wo",), names=names) == "b stream later normed"
    assert inside(body, names=names) == "normed"
