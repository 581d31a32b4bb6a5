"""runtime/engines/openvino/residual_sums.py: sums read unrounded values, products rounded ones."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
op = openvino.opset13

from diffpress.runtime.engines.openvino.residual_sums import keep_residual_sums_float_  # noqa: E402

C = 4
RNG = np.random.default_rng(0)


def rounded(x: Any) -> Any:
    """Return x after a pair with scale 1, as signed_integers.py writes it."""
    return op.fake_quantize(x, *(np.float32(bound) for bound in (-128, 127, -128, 127)), 256)


def layer(x: Any) -> Any:
    """Return a linear layer of x with a bias whose shape is computed, as for convolutions."""
    bias = op.reshape(op.constant(RNG.standard_normal(C).astype(np.float32)), np.array([1, C]), False)
    return op.add(op.matmul(x, RNG.standard_normal((C, C)).astype(np.float32), False, False), bias)


def model_of(x: Any, *results: Any) -> Any:
    return openvino.Model([op.result(node) for node in results], [x], "model")


def rounded_inputs(model: Any) -> list[str]:
    """Return the types of the operations that read a rounded value, sorted."""
    pairs = [node for node in model.get_ordered_ops() if node.get_type_name() == "FakeQuantize"]
    targets = [target for pair in pairs for target in pair.output(0).get_target_inputs()]
    return sorted(target.get_node().get_type_name() for target in targets)


def result_of(model: Any, x: np.ndarray) -> np.ndarray:
    compiled = openvino.Core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    out: np.ndarray = compiled(x)[0]
    return out


def test_a_sum_and_its_branch_are_not_rounded() -> None:
    x = op.parameter([2, C], np.float32)
    branch = layer(rounded(x))
    model = model_of(x, op.relu(rounded(op.add(x, rounded(branch)))))
    plain = model_of(x, op.relu(op.add(x, branch)))
    values = RNG.standard_normal((2, C)).astype(np.float32)
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == ["MatMul"]  # the input of the layer
    np.testing.assert_allclose(result_of(model, values), result_of(plain, values), atol=1e-6)


def test_readers_that_multiply_keep_the_rounding_also_behind_moves() -> None:
    x = op.parameter([2, C], np.float32)
    total = rounded(op.add(x, op.relu(x)))
    moved = op.transpose(op.reshape(total, np.array([1, 2, C]), False), np.array([0, 2, 1]))
    model = model_of(x, op.relu(total), layer(total), op.matmul(moved, np.ones((1, 2, 1), np.float32), False, False))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == ["MatMul", "Reshape"]


def test_a_branch_is_followed_through_moves_to_its_sum() -> None:
    x = op.parameter([2, C], np.float32)
    branch = op.reshape(op.unsqueeze(rounded(op.relu(x)), np.array([0])), np.array([2, C]), False)
    model = model_of(x, op.add(branch, x))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == []


@pytest.mark.parametrize(("transpositions", "rounded_by"), [(1, []), (2, ["Transpose"])])
def test_a_rounding_before_two_transpositions_stays(transpositions: int, rounded_by: list[str]) -> None:
    x = op.parameter([C, C], np.float32)
    branch = rounded(op.relu(x))
    for _ in range(transpositions):
        branch = op.transpose(branch, np.array([1, 0]))
    model = model_of(x, op.add(branch, x))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == rounded_by


def test_moves_with_one_name_are_both_followed() -> None:
    x = op.parameter([2, C], np.float32)
    total = rounded(op.add(x, op.relu(x)))
    moved = [op.reshape(total, np.array([1, 2, C]), False), op.reshape(total, np.array([2, C]), False)]
    split = op.split(op.concat(moved[:1], 0), np.int64(0), 1)
    for node in (*moved, split):
        node.set_friendly_name("same")
    model = model_of(x, op.relu(moved[0]), layer(moved[1]), op.relu(split.output(0)))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == ["Reshape"]  # the one before the layer


def test_a_sum_that_is_scaled_or_added_to_itself_or_returned_is_not_rounded() -> None:
    x = op.parameter([2, C], np.float32)
    scaled = rounded(op.divide(op.add(x, op.relu(x)), np.float32(1.4)))
    twice = rounded(op.tanh(x))
    model = model_of(x, op.relu(scaled), op.add(twice, twice), rounded(op.add(x, op.sigmoid(x))))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == []


def test_what_is_no_residual_sum_stays_rounded() -> None:
    x = op.parameter([2, C], np.float32)
    with_bias = rounded(layer(x))  # a stored bias is no branch
    again = rounded(rounded(op.add(x, op.relu(x))))  # rounded with another scale
    model = model_of(x, op.relu(with_bias), layer(again))
    keep_residual_sums_float_(model)
    assert rounded_inputs(model) == ["FakeQuantize", "MatMul", "Relu"]
