"""Q/DQ pairs of uint8 numbers with zero point 128, written as OpenVINO runs them best: as signed numbers around 0.

    x -> FakeQuantize to 0..255 -> u8 -> float -> - z -> * s      as read from ONNX
    x -> FakeQuantize to -z s..(255 - z) s                        the same values, in one operation

The graph stores uint8 because ONNX Runtime has integer kernels for no other type (export/passes/qdq_placement.py).
OpenVINO chooses the type of the integers itself for a FakeQuantize, but keeps uint8 where it is written out; and its
fused attention has integer products only for signed numbers. With uint8 the queries and keys of attention were
converted to float by kernels of their own and multiplied in float.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LEVELS, LARGEST = 256, 255.0
STEPS = ("Convert", "Subtract", "Multiply")  # from integers to floats


def with_signed_integers(model: Any) -> None:
    """Replace every such pair of an openvino.Model in place; anything else, such as int8 weights, stays as it is."""
    from openvino import opset13 as op

    for operation in model.get_ordered_ops():
        if operation.get_type_name() != "FakeQuantize":
            continue
        (integers, *others) = _readers(operation)
        if others or integers.get_type_name() != "Convert" or integers.get_output_element_type(0).to_string() != "u8":
            continue
        for end, zero, scale in _dequantized(integers):
            data, low, high = (operation.input_value(index) for index in range(3))
            bounds = (op.constant(np.float32(bound)) for bound in (-zero * scale, (LARGEST - zero) * scale))
            pair = op.fake_quantize(data, low, high, *bounds, LEVELS)
            pair.set_friendly_name(end.get_friendly_name())
            end.output(0).replace(pair.output(0))


def _dequantized(integers: Any) -> list[tuple[Any, float, float]]:
    """Return the last operation, zero point and scale of each conversion of these integers to floats."""
    ends: list[tuple[Any, list[float | None]]] = [(integers, [])]
    for kind in STEPS:
        ends = [
            (reader, [*constants, _constant(reader)])
            for operation, constants in ends
            for reader in _readers(operation)
            if reader.get_type_name() == kind
        ]
    return [(end, zero, scale) for end, (_, zero, scale) in ends if zero is not None and scale is not None]


def _readers(operation: Any) -> list[Any]:
    return [target.get_node() for target in operation.output(0).get_target_inputs()]


def _constant(operation: Any) -> float | None:
    """Return the value of the second input if it is a stored scalar."""
    if operation.get_input_size() < 2:
        return None
    source = operation.input_value(1).get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant" or source.get_data().size != 1:
        return None
    return float(source.get_data().item())
