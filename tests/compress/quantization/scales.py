"""The quantization of a checkpoint that the test has quantized."""

from __future__ import annotations

from diffpress.compress.checkpoint import Checkpoint, Quantization


def scales_of(checkpoint: Checkpoint) -> Quantization:
    """Return the checkpoint's quantization, which is not None."""
    assert checkpoint.quantization is not None
    return checkpoint.quantization
