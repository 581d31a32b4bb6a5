"""What a quantized graph promises: which layers compute in few bits, which only store them, and its name in a word."""

from __future__ import annotations

from collections import Counter

from diffpress.compress.checkpoint import Quantization

STORED = "int8_weight_only"


def layer_formats(quantization: Quantization | None) -> dict[str, str]:
    """Layer -> name of its format (compress/quantization/formats.py)."""
    return quantization.layer_formats if quantization else {}


def computing_layers(quantization: Quantization | None) -> list[str]:
    """The layers that multiply in few bits: with a scale for their input, not for their weight alone."""
    return [name for name in layer_formats(quantization) if quantization and f"{name}.input" in quantization.amax]


def precision_of(quantization: Quantization | None, rest: str = "fp32") -> str:
    """'int8', or 'int8+w4a8' with the format of most layers first; `rest` where nothing is quantized."""
    counts = Counter(layer_formats(quantization).values())
    named = [kind for kind, _ in counts.most_common() if kind != STORED]
    return "+".join(named or counts) or rest
