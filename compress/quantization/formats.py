"""The number formats: what a layer's weights and activations are rounded to.

int8               W8A8   8-bit integers, a scale per output channel of a weight, one per activation
int8_weight_only   W8A16  the weights alone: what fragile linear layers are stored in
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Number:
    """What one value is rounded to; `largest` is the number that an amax becomes, `bits` as modelopt writes it."""

    name: str
    largest: float
    bits: int | tuple[int, int]


@dataclass(frozen=True)
class Format:
    """`activations` None: they stay in floating point. `block`: how many inputs share a weight's scale, 0 for all."""

    weights: Number
    activations: Number | None = None
    block: int = 0


INT8 = Number("int8", 127, 8)

FORMATS: dict[str, Format] = {
    "int8": Format(INT8, INT8),
    "int8_weight_only": Format(INT8),
}
