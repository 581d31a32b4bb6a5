"""Torch's inference fast path of attention: one fused kernel for a whole nn.TransformerEncoderLayer.

The kernel reads the weights of the layer's modules and calls none of them. Quantizers inside them are bypassed, hooks
see nothing, the kernel is not counted, and ONNX has no operator for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def without_fast_path() -> Iterator[None]:
    """Run nn.MultiheadAttention and nn.TransformerEncoderLayer module by module inside the context."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
