"""The number formats: what a layer's weights and activations are rounded to.

int8               W8A8   8-bit integers, a scale per output channel of a weight, one per activation
int8_weight_only   W8A16  the weights alone: what fragile linear layers are stored in
fp8                W8A8   8-bit floats (E4M3: 4 bits of exponent, 3 of mantissa, at most 448), scales as those of int8
int4               W4A16  the weights alone in 4 bits, a scale for every 32 inputs of an output channel
w4a8               W4A8   4-bit weights with a scale per output channel: engines multiply them as 8-bit integers
nvfp4              W4A4   4-bit floats (E2M1, at most 6), an E4M3 scale for every 16 inputs, one float over all of those

An amax is the largest magnitude that is not clipped, and becomes the format's largest number: scale = amax / largest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True)
class Number:
    """What one value is rounded to; `largest` is the number that an amax becomes, `bits` as modelopt writes it.

    `name` is what numpy with ml_dtypes calls it, and ONNX in capitals.
    """

    name: str
    largest: float
    bits: int | tuple[int, int]

    @property
    def is_integer(self) -> bool:
        return isinstance(self.bits, int)

    @property
    def width(self) -> int:
        """How many bits it takes."""
        return self.bits if isinstance(self.bits, int) else 1 + sum(self.bits)


@dataclass(frozen=True)
class Format:
    """`activations` None: they stay in floating point. `block`: how many inputs share a weight's scale, 0 for a row.

    `scales`: what those of blocks are rounded to themselves, None for float32.
    """

    weights: Number
    activations: Number | None = None
    block: int = 0
    scales: Number | None = None


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
    """The shape of the scales of a weight [out, in, ...]: [out], or [out, blocks] where inputs share them.

    Blocks lie along the row of inputs that makes one output, in x kernel. A row that the block does not divide takes
    half the block, and one scale where that does not divide it either.
    """
    row = prod(weight[1:])
    for block in (form.block, form.block // 2):
        if block and row % block == 0:
            return (weight[0], row // block)
    return (weight[0],)


def stored_bytes(form: Format, weight: Sequence[int]) -> int:
    """What a file needs for a weight of this shape and its scales."""
    scale = form.scales.width // 8 if form.scales else 4
    return -(-prod(weight) * form.weights.width // 8) + scale * prod(scale_shape(form, weight))
