"""Rewrite Q/DQ pairs of uint8 numbers with zero point 128 as signed numbers around 0, which OpenVINO runs faster.

    x -> FakeQuantize to 0..255 -> u8 -> float -> - z -> * s      as read from ONNX
    x -> FakeQuantize to -z s..(255 - z) s                        the same values, in one operation

The graph stores uint8 because ONNX Runtime has integer kernels for no other type (export/passes/qdq_placement.py).
OpenVINO chooses the type of the integers itself for a FakeQuantize, but keeps uint8 where it is written out; and its
fused attention has integer products only for signed numbers. With uint8 the queries and keys of attention were
converted to float by kernels of their own and multiplied in float. Measured on processors with AVX512-VNNI and AMX.
"""

from __future__ import annotations

from typing import Any

import numpy as np

LARGEST = 255.0
STEPS = ("Convert", "Subtract", "Multiply")  # from integers to floats


def use_signed_integers_(model: Any) -> None:
    """Rewrite every Q/DQ pair of uint8 numbers in an openvino.Model; int8 weights and all else stay as they are."""
    from openvino import opset13 as op

    for operation in model.get_ordered_ops():
        readers = _readers(operation)
        if not _is_quantize(operation) or len(readers) != 1 or not _is_uint8(readers[0]):
            continue
        for end, zero, scale in _dequantized(readers[0]):
            data, low, high = (operation.input_value(index) for index in range(3))
            bounds = (op.constant(np.float32(bound)) for bound in (-zero * scale, (LARGEST - zero) * scale))
            pair = op.fake_quantize(data, low, high, *bounds, operation.get_levels())
            pair.set_friendly_name(end.get_friendly_name())
            end.output(0).replace(pair.output(0))


def _is_quantize(operation: Any) -> bool:
    """Return whether it rounds float32 numbers to 0..255, as ONNX's QuantizeLinear is read."""
    return (
        operation.get_type_name() == "FakeQuantize"
        and operation.get_output_element_type(0).to_string() == "f32"
        and (operation.get_levels(), _scalar(operation.input_value(3)), _scalar(operation.input_value(4)))
        == (LARGEST + 1, 0.0, LARGEST)
    )


def _is_uint8(operation: Any) -> bool:
    return operation.get_type_name() == "Convert" and operation.get_output_element_type(0).to_string() == "u8"


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
    return _scalar(operation.input_value(1)) if operation.get_input_size() > 1 else None


def _scalar(value: Any) -> float | None:
    """Return the value of a stored scalar, also of one that is converted; None for anything else."""
    source = value.get_node()
    if source.get_type_name() == "Convert":
        source = source.input_value(0).get_node()
    if source.get_type_name() != "Constant" or source.get_data().size != 1:
        return None
    return float(source.get_data().item())
