"""Graph of a quantized denoiser for an engine that cannot run denoiser.onnx: some more layers are in float there.

    denoiser.openvino.onnx     what OpenVINO runs, if it cannot compile the rounding around some layers

Which combinations an engine's compiler cannot handle is not documented and changes with its version, so it is measured,
in one evaluation against torch's fake quantization. Bisection finds the smallest number of first layers whose
quantization fails, and the last of these returns to float, until the engine runs the rest. If its removal alone does
not help, the same layer of all repeated blocks ('blocks.*.attn.to_v' for 'blocks.3.attn.to_v') returns with it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.mixed_precision import smallest
from diffpress.compress.quantization.algorithms.sensitivity import quantized_layers
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.denoiser import Denoiser, TargetGraph
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.lowering import PassContext, lower
from diffpress.runtime.engines import available, load_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs

logger = logging.getLogger(__name__)

# the engine that compiles a graph as a whole; ONNX Runtime runs in float what it has no integer kernel for
ENGINE = "openvino"

# the engine's noise may exceed that of quantization by this much; less than ALWAYS_GOOD_DB is never required
TOLERANCE_DB, ALWAYS_GOOD_DB = 10.0, 40.0

Failure = Callable[[Quantization], str]


def with_engine_variants(denoiser: Denoiser, threads: int | None = None) -> Denoiser:
    """Return the denoiser with a graph for OpenVINO, if it is installed and cannot run denoiser.onnx, but less of it.

    Models of more than 100 million parameters are returned as they are: a graph takes minutes to compile.
    """
    portable = denoiser.portable
    if portable.quantization is None or ENGINE not in available() or is_large(denoiser.checkpoint.model):
        return denoiser
    with TemporaryDirectory() as folder:
        failure = _Trial(denoiser, Path(folder), threads).failure
        reason = failure(portable.quantization)
        in_float = layers_that_fail(portable.quantization, failure) if reason else []
    if not in_float:
        return denoiser
    rest = portable.quantization.without(in_float)
    variant = TargetGraph(
        f"denoiser.{ENGINE}.onnx", _lowered(denoiser, rest), rest, portable.float_precision, (ENGINE,)
    )
    logger.info(f"{ENGINE} cannot run {portable.file} ({reason}): {variant.file} keeps {', '.join(in_float)} in float")
    return replace(denoiser, variants=(variant, *denoiser.variants))


def layers_that_fail(quantization: Quantization, failure: Failure) -> list[str]:
    """Return the modules without whose scales an engine runs the graph; none if it cannot run the float graph either.

    Args:
        quantization: Scales with which it fails.
        failure: Returns why the engine cannot run the graph with these scales, or ''.
    """
    modules = quantized_layers(quantization)
    if failure(quantization.without(modules)):
        return []
    in_float: list[str] = []
    while failure(quantization.without(in_float)):
        names = [name for name in modules if name not in in_float]

        def fails(count: int, names: list[str] = names, in_float: list[str] = in_float) -> bool:
            return bool(failure(quantization.without([*in_float, *names[count:]])))

        found = names[smallest(1, len(names), fails) - 1]
        siblings = [name for name in names if _pattern(name) == _pattern(found)]
        in_float = [*in_float, *([found] if not failure(quantization.without([*in_float, found])) else siblings)]
    return in_float


def _pattern(name: str) -> str:
    """Return the name without the numbers of blocks: the same for the same layer of every block."""
    return re.sub(r"\d+", "*", name)


def _lowered(denoiser: Denoiser, quantization: Quantization) -> Graph:
    return lower(denoiser.float_graph, "cpu", PassContext(quantization, denoiser.portable.float_precision))


class _Trial:
    """One evaluation of the quantized denoiser in the engine, compared with torch's fake quantization."""

    def __init__(self, denoiser: Denoiser, folder: Path, threads: int | None) -> None:
        self._denoiser, self._file, self._threads = denoiser, folder / "tried.onnx", threads
        self._float = TorchNetwork(denoiser.checkpoint.model, denoiser.case.spec)

    def failure(self, quantization: Quantization) -> str:
        """Return why the engine cannot run the graph with these scales, or ''."""
        checkpoint, case = self._denoiser.checkpoint.evolve(quantization=quantization), self._denoiser.case
        save_graph(_lowered(self._denoiser, quantization), self._file)
        try:
            with closing(load_engine(self._file, ENGINE, self._threads)) as engine:
                for batch in sorted({2, case.samples}):
                    inputs = dummy_inputs(engine, case.spec, batch)
                    found = engine.run(inputs)
        except InvalidInputError as error:
            return str(error).removeprefix(f"{self._file}: ").partition(";")[0]
        expected = TorchNetwork(fake_quantized(checkpoint), case.spec).run(inputs)
        allowed_db = min(sqnr_db(self._float.run(inputs), expected) - TOLERANCE_DB, ALWAYS_GOOD_DB)
        found_db = sqnr_db(expected, found)
        return "" if found_db >= allowed_db else f"its SQNR to fake quantization is {found_db:.0f} dB"
