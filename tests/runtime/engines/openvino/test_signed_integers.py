"""runtime/engines/openvino/signed_integers.py: a pair without uint8 rounds to the same values."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

openvino = pytest.importorskip("openvino")
op = openvino.opset13

from diffpress.runtime.engines.openvino.signed_integers import use_signed_integers_  # noqa: E402

SCALE = np.float32(0.037)


def quantized(x: Any, zero: int = 128) -> Any:
    """Return x as uint8 numbers, as OpenVINO reads QuantizeLinear."""
    bounds = (op.constant(np.float32(bound)) for bound in (-zero * SCALE, (255 - zero) * SCALE, 0.0, 255.0))
    return op.convert(op.fake_quantize(x, *bounds, 256), "u8")


def dequantized(numbers: Any, zero: int = 128, scale: Any = SCALE) -> Any:
    """Return uint8 numbers in float, as OpenVINO reads DequantizeLinear."""
    offset = op.convert(op.constant(np.uint8(zero)), "f32")
    return op.multiply(op.subtract(op.convert(numbers, "f32"), offset), scale)


def pair(x: Any, zero: int = 128, scale: Any = SCALE) -> Any:
    return dequantized(quantized(x, zero), zero, scale)


def kinds(model: Any) -> list[str]:
    return [operation.get_type_name() for operation in model.get_ops()]


def outputs(model: Any, x: np.ndarray) -> tuple[np.ndarray, ...]:
    options = {"INFERENCE_PRECISION_HINT": "f32"}
    return tuple(openvino.Core().compile_model(model, "CPU", options)(x).to_tuple())


@pytest.mark.parametrize("zero", [128, 0, 7])
def test_the_values_are_the_same_also_outside_the_range(zero: int) -> None:
    x = op.parameter([600], np.float32)
    model = openvino.Model([op.result(op.relu(pair(x, zero)))], [x], "pair")
    values = (np.arange(-300, 300) + np.float32(0.3)) * SCALE  # no ties, which float32 decides either way
    (expected,) = outputs(model, values)
    use_signed_integers_(model)
    assert sorted(set(kinds(model))) == ["Constant", "FakeQuantize", "Parameter", "Relu", "Result"]
    np.testing.assert_allclose(outputs(model, values)[0], expected, atol=1e-6)
    numbers = np.clip(np.rint(values / SCALE), -zero, 255 - zero)
    np.testing.assert_allclose(expected, np.maximum(numbers * SCALE, 0.0), atol=1e-5)


def test_numbers_with_two_scales_behind_them_keep_both_and_their_names() -> None:
    x = op.parameter([64], np.float32)
    numbers = quantized(x)
    ends = [dequantized(numbers), dequantized(numbers, scale=np.float32(0.5) * SCALE)]
    ends[0].set_friendly_name("layer.input/DQ")
    model = openvino.Model([op.result(op.relu(ends[0])), op.result(ends[1])], [x], "pairs")
    values = (np.arange(-32, 32) + np.float32(0.3)) * SCALE
    expected = outputs(model, values)
    use_signed_integers_(model)
    assert kinds(model).count("FakeQuantize") == 2 and "Convert" not in kinds(model)
    assert "layer.input/DQ" in [operation.get_friendly_name() for operation in model.get_ops()]
    for found, wanted in zip(outputs(model, values), expected, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-6)


def test_a_pair_of_a_rounded_value_rounds_it_again() -> None:
    x = op.parameter([64], np.float32)
    model = openvino.Model([op.result(op.relu(pair(pair(x), scale=np.float32(2.0))))], [x], "nested")
    values = (np.arange(-32, 32) + np.float32(0.3)) * SCALE
    (expected,) = outputs(model, values)
    use_signed_integers_(model)
    assert kinds(model).count("FakeQuantize") == 2
    np.testing.assert_allclose(outputs(model, values)[0], expected, atol=1e-5)


def test_rounding_that_is_read_in_float_or_has_other_levels_stays() -> None:
    x = op.parameter([4], np.float32)
    numbers = quantized(x)
    read_twice = numbers.input_value(0).get_node()
    few = op.fake_quantize(x, *(np.float32(bound) for bound in (-1, 1, 0, 15)), 16)
    results = [dequantized(numbers), op.relu(read_twice), dequantized(op.convert(few, "u8"))]
    model = openvino.Model([op.result(node) for node in results], [x], "others")
    before = kinds(model)
    use_signed_integers_(model)
    assert sorted(kinds(model)) == sorted(before)


def test_what_is_not_a_pair_with_stored_scalars_stays() -> None:
    x, scale = op.parameter([2, 4], np.float32), op.parameter([1], np.float32)
    weights = op.multiply(op.convert(op.constant(np.ones((4, 4), np.int8)), "f32"), SCALE)
    numbers = op.convert(op.convert(x, "u8"), "f32")  # not rounded by a FakeQuantize
    by_channel = pair(x, scale=op.constant(np.ones(4, np.float32)))
    results = [op.matmul(numbers, weights, False, False), pair(x, scale=scale), by_channel]
    model = openvino.Model([op.result(node) for node in results], [x, scale], "others")
    before = kinds(model)
    use_signed_integers_(model)
    assert sorted(kinds(model)) == sorted(before)


def test_no_pair_of_a_quantized_graph_is_left(quantized_graph: Callable[..., Path]) -> None:
    model = openvino.Core().read_model(quantized_graph("Conv", "MatMul", "Gemm"))
    pairs = kinds(model).count("FakeQuantize")
    use_signed_integers_(model)
    types = {operation.get_output_element_type(0).to_string() for operation in model.get_ops()}
    assert pairs and kinds(model).count("FakeQuantize") == pairs and "u8" not in types
