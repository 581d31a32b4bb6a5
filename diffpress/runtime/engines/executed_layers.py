"""What a profiler of an engine reports: the layers that the engine executed, and the time of each.

A layer is one kernel with everything that the engine fused into it. It is named after the torch layer, or the ONNX
node, whose product it computes; a kernel without a product after the first node that it covers, and one that the engine
inserted has the engine's own name.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import numpy as np

CONVOLUTION, LINEAR, ATTENTION = "convolution", "linear", "attention"
NORMALIZATION, ELEMENTWISE, CONVERSION, OTHER = "normalization", "elementwise", "reorder/conversion", "other"
OPERATIONS = (CONVOLUTION, LINEAR, ATTENTION, NORMALIZATION, CONVERSION, ELEMENTWISE, OTHER)

INT8 = "int8"
PRECISIONS = {
    **{"f32": "fp32", "float": "fp32", "f16": "fp16", "float16": "fp16", "bf16": "bf16", "bfloat16": "bf16"},
    **{"i8": INT8, "u8": INT8, "uint8": INT8},
}  # an engine's name of a type -> ours


class ExecutedLayer(NamedTuple):
    """A layer as an engine executed it.

    Attributes:
        name: Name of the torch layer, the ONNX node or the engine's own kernel.
        operation: One of OPERATIONS.
        kernel: The engine's name for the kind of kernel.
        precision: What it computes in: 'fp32', 'bf16', 'int8', ..., or 'mixed' if the engine does not report it.
        macs: Its multiply-accumulates; those of convolutions, matrix products and attention only.
        bytes: What it reads and writes: its inputs with weights, and its outputs.
    """

    name: str
    operation: str
    kernel: str
    precision: str
    macs: int
    bytes: int

    @property
    def is_integer(self) -> bool:
        """Whether its products are those of integers."""
        return self.precision == INT8


class Profiler(Protocol):
    """A second instance of an engine's graph that measures its layers, for inputs of fixed shapes."""

    def run(self) -> None:
        """Evaluate the graph once."""

    def finish(self) -> tuple[list[ExecutedLayer], np.ndarray]:
        """Return the layers, and the time that each took in the first 1, 2, ... runs together, in ms [runs, layers]."""
