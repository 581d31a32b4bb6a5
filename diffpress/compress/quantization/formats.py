"""Number formats of a layer's weights and activations.

int8               W8A8   8-bit integers, one scale per output channel of a weight, one per activation
int8_weight_only   W8A16  8-bit weights only; the storage format of sensitive linear layers
fp8                W8A8   8-bit floats (E4M3: 4 exponent bits, 3 mantissa bits, at most 448), scales as for int8
int4               W4A16  4-bit weights only, one scale per 32 inputs of an output channel
w4a8               W4A8   4-bit weights with one scale per output channel; engines multiply them as 8-bit integers
nvfp4              W4A4   4-bit floats (E2M1, at most 6), one E4M3 scale per 16 inputs and one float per tensor

An amax is the largest magnitude that is not clipped. It maps to the format's largest number: scale = amax / largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Number:
    """Number type of one value.

    Attributes:
        name: The dtype name of numpy with ml_dtypes; ONNX uses it in capitals.
        largest: The number that an amax maps to.
        bits: As in modelopt: bits of an integer, or (exponent, mantissa) bits of a float.
    """

    name: str
    largest: float
    bits: int | tuple[int, int]

    @property
    def is_integer(self) -> bool:
        """Whether the type is an integer."""
        return isinstance(self.bits, int)

    @property
    def width(self) -> int:
        """Storage size in bits."""
        return self.bits if isinstance(self.bits, int) else 1 + sum(self.bits)


@dataclass(frozen=True)
class Format:
    """Number format of a layer.

    Attributes:
        weights: Number type of the weights.
        activations: Number type of the activations; None keeps them in floating point.
        block: Number of inputs that share a weight scale; 0 means one scale per output channel.
        scales: Number type of the block scales; None means float32.
    """

    weights: Number
    activations: Number | None = None
    block: int = 0
    scales: Number | None = None


LEAST_MAGNITUDE = 2.0**-100  # smaller magnitudes count as zero

INT8 = Number("int8", 127, 8)
INT4 = Number("int4", 7, 4)
FP8 = Number("float8_e4m3fn", 448, (4, 3))
FP4 = Number("float4_e2m1fn", 6, (2, 1))

FORMATS: dict[str, Format] = {
    "int8": Format(INT8, INT8),
    "int8_weight_only": Format(INT8),
    "fp8": Format(FP8, FP8),
    "int4": Format(INT4, block=32),
    "w4a8": Format(INT4, INT8),
    "nvfp4": Format(FP4, FP4, block=16, scales=FP8),
}


def scale_shape(form: Format, weight: Sequence[int]) -> tuple[int, ...]:
    """Return the shape of the scales of a weight [out, in, ...]: [out] or [out, blocks].

    Blocks lie along the flattened row (in x kernel) of one output. If the block does not divide the row, half the block
    is used; if that does not divide it either, one scale per row.
    """
    row = prod(weight[1:])
    for block in (form.block, form.block // 2):
        if block and row % block == 0:
            return (weight[0], row // block)
    return (weight[0],)


def stored_bytes(form: Format, weight: Sequence[int]) -> int:
    """Return the file size in bytes of a weight of this shape and its scales."""
    scale = form.scales.width // 8 if form.scales else 4
    return -(-prod(weight) * form.weights.width // 8) + scale * prod(scale_shape(form, weight))
