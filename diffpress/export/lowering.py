"""Lowering: the ordered passes that turn a traced graph into what each target runs.

    traced --float--> float graph --cpu-------> denoiser.onnx            one portable graph for all engines on the CPU
                                  --tensorrt--> denoiser.tensorrt.onnx   other Q/DQ form, half precision after Q/DQ
                                                  --check--> the same in types that engines on the CPU can run

The order of a tuple is the design:

    svdquant before smoothquant     the low-rank branch reads the activation before it is smoothed
    both before linear_to_conv1x1   they look for the layers that were traced
    min_opset before insert_qdq     earlier opsets do not have the types of 4-bit and fp8 weights
    to_half at the end              it also converts the scales of Q/DQ, and weights are rounded once

A pass states what it requires of its input. After it, the graph must be valid ONNX with the same inputs and outputs;
none of these checks reads a weight. `bound` is checked by tests, which run the graph before and after every pass.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass

import onnx

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.quantization.formats import FORMATS, INT8
from diffpress.export.graph.model import Graph, check_graph
from diffpress.export.graph.opsets import needed_opset, opset_of, with_min_opset
from diffpress.export.passes.bf16_to_fp32 import bf16_to_fp32
from diffpress.export.passes.fold_timesteps import fold_timesteps
from diffpress.export.passes.fp32_fallback import ROUNDING
from diffpress.export.passes.half_precision import FLOAT, to_half
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.passes.linear_to_conv1x1 import linear_to_conv1x1
from diffpress.export.passes.smoothquant import SMOOTHED, apply_smoothquant
from diffpress.export.passes.svdquant import svdquant
from diffpress.runtime.errors import InvalidInputError

logger = logging.getLogger(__name__)

# a rewrite computes the same function: largest difference of the output, relative to its largest value
SAME = 1e-4

HALVES = (onnx.TensorProto.FLOAT16, onnx.TensorProto.BFLOAT16)


@dataclass(frozen=True)
class PassContext:
    """What passes read besides the graph.

    Attributes:
        quantization: Formats and scales; None for a float model.
        precision: Precision of the float layers: 'fp32', 'fp16' or 'bf16'.
        keep: Modules that stay float32 in half precision.
        timesteps: Timesteps to restrict the graph to; empty for all.
        name: Name of the network in messages.
    """

    quantization: Quantization | None = None
    precision: str = FLOAT
    keep: tuple[str, ...] = ()
    timesteps: tuple[float, ...] = ()
    name: str = "denoiser"

    def __post_init__(self) -> None:
        quantization = self.quantization
        for kind in (quantization.format, *quantization.layer_formats.values()) if quantization else ():
            if kind not in FORMATS:
                raise InvalidInputError(f"quantization format '{kind}' has no Q/DQ graph; known: {', '.join(FORMATS)}")


@dataclass(frozen=True)
class Pass:
    """One rewrite of a graph.

    Attributes:
        name: Its name in errors.
        run: The rewrite; returns the graph itself if there is nothing to do.
        requires: Returns what the pass requires of its input and does not find there, or '', as by default.
        bound: Largest difference of the output, relative to its largest value; None if the pass rounds numbers, which
            parity checks (export/verify/parity.py).
    """

    name: str
    run: Callable[[Graph, PassContext], Graph]
    requires: Callable[[Graph, PassContext], str] = lambda graph, context: ""
    bound: float | None = SAME


def lower(graph: Graph, target: str, context: PassContext) -> Graph:
    """Return `graph` in the form of `target`, a key of LOWERING; the argument is not modified.

    Raises:
        InvalidInputError: If the scales do not fit the graph, or the graph cannot be rewritten; a note names the pass.
        RuntimeError: If a pass breaks an invariant, which is a bug; the message names the pass.
    """
    for step in LOWERING[target]:
        graph = run_pass(step, graph, context)
    return graph


def run_pass(step: Pass, graph: Graph, context: PassContext) -> Graph:
    """Run one pass and check its precondition and its invariants (see `lower` for the errors)."""
    missing = step.requires(graph, context)
    if missing:
        raise RuntimeError(f"pass '{step.name}' requires {missing}")
    interface = _interface(graph)
    try:
        result = step.run(graph, context)
    except Exception as error:
        error.add_note(f"in pass '{step.name}'")
        raise
    try:
        check_graph(result)
    except onnx.checker.ValidationError as error:
        raise RuntimeError(f"pass '{step.name}' returned an invalid graph: {error}") from error
    if _interface(result) != interface:
        raise RuntimeError(f"pass '{step.name}' changed the inputs or outputs of the graph")
    return result


def _interface(graph: Graph) -> list[list[bytes]]:
    inner = graph.proto.graph
    return [[value.SerializeToString(deterministic=True) for value in values] for values in (inner.input, inner.output)]


# --- what passes require ---------------------------------------------------------------------------------------


def _float32(graph: Graph, context: PassContext) -> str:
    inner = graph.proto.graph
    rounded = any(node.op_type in ROUNDING for node in inner.node)
    half = any(tensor.data_type in HALVES for tensor in inner.initializer)
    return "a float32 graph without Q/DQ" if rounded or half else ""


def _unsmoothed(graph: Graph, context: PassContext) -> str:
    smoothed = any(tensor.name.endswith(SMOOTHED) for tensor in graph.proto.graph.initializer)
    return "layers that are not smoothed yet" if smoothed else _float32(graph, context)


def _float32_of_opset(graph: Graph, context: PassContext) -> str:
    needed = needed_opset(context.quantization.layer_formats.values()) if context.quantization else 0
    return f"opset {needed}" if opset_of(graph) < needed else _float32(graph, context)


def _no_half(graph: Graph, context: PassContext) -> str:
    half = any(tensor.data_type in HALVES for tensor in graph.proto.graph.initializer)
    return "a graph that is not in half precision" if half else ""


# --- the passes ------------------------------------------------------------------------------------------------


def _fold(graph: Graph, context: PassContext) -> Graph:
    return fold_timesteps(graph, context.timesteps) if context.timesteps else graph


def _if_quantized(rewrite: Callable[[Graph, Quantization], Graph]) -> Callable[[Graph, PassContext], Graph]:
    """Return the pass that rewrites the graphs of quantized models only."""
    return lambda graph, context: graph if context.quantization is None else rewrite(graph, context.quantization)


def _convolve_integer_layers(graph: Graph, quantization: Quantization) -> Graph:
    formats = quantization.layer_formats.items()
    integer = [layer for layer, kind in formats if FORMATS[kind].activations is INT8]
    rounded = {key.removesuffix(".output") for key in quantization.amax if key.endswith(".output")}
    return linear_to_conv1x1(graph, integer, rounded)


def _halve(graph: Graph, context: PassContext) -> Graph:
    if context.precision == FLOAT:
        return graph
    halved, lost = to_half(graph, context.precision, context.keep)
    logger.info(f"{context.name} in {context.precision}: {lost}")
    return halved


FOLD_TIMESTEPS = Pass("fold_timesteps", _fold, _float32)
SVDQUANT = Pass("svdquant", _if_quantized(lambda graph, scales: svdquant(graph, scales.svdquant)), _unsmoothed)
SMOOTHQUANT = Pass(
    "smoothquant", _if_quantized(lambda graph, scales: apply_smoothquant(graph, scales.smooth)), _float32
)
LINEAR_TO_CONV1X1 = Pass("linear_to_conv1x1", _if_quantized(_convolve_integer_layers), _float32)
MIN_OPSET = Pass(
    "min_opset",
    _if_quantized(lambda graph, scales: with_min_opset(graph, needed_opset(scales.layer_formats.values()))),
)
INSERT_QDQ = Pass("insert_qdq", _if_quantized(insert_qdq), _float32_of_opset, bound=None)
INSERT_QDQ_TENSORRT = Pass(
    "insert_qdq_tensorrt",
    _if_quantized(lambda graph, scales: insert_qdq(graph, scales, tensorrt=True)),
    _float32_of_opset,
    bound=None,
)
TO_HALF = Pass("to_half", _halve, _no_half, bound=None)
BF16_TO_FP32 = Pass("bf16_to_fp32", lambda graph, context: bf16_to_fp32(graph), bound=None)

LOWERING: dict[str, tuple[Pass, ...]] = {
    "float": (FOLD_TIMESTEPS,),
    "cpu": (SVDQUANT, SMOOTHQUANT, LINEAR_TO_CONV1X1, MIN_OPSET, INSERT_QDQ, TO_HALF),
    "tensorrt": (SVDQUANT, SMOOTHQUANT, MIN_OPSET, INSERT_QDQ_TENSORRT, TO_HALF),
    "check": (BF16_TO_FP32,),
}
