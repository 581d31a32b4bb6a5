"""Expected precision of a quantized graph: which layers compute in few bits, which only store weights."""

from __future__ import annotations

from collections import Counter

from diffpress.compress.checkpoint import Quantization

STORED = "int8_weight_only"


def layer_formats(quantization: Quantization | None) -> dict[str, str]:
    """Return layer -> name of its format (compress/quantization/formats.py)."""
    return quantization.layer_formats if quantization else {}


def computing_layers(quantization: Quantization | None) -> list[str]:
    """Return the layers that multiply in few bits: their input has a scale, not only their weight."""
    return [name for name in layer_formats(quantization) if quantization and f"{name}.input" in quantization.amax]


def precision_of(quantization: Quantization | None, rest: str = "fp32") -> str:
    """Return 'int8', or 'int8+w4a8' with the most frequent format first; `rest` if nothing is quantized."""
    counts = Counter(layer_formats(quantization).values())
    named = [kind for kind, _ in counts.most_common() if kind != STORED]
    return "+".join(named or counts) or rest
