"""Alternative graphs of the denoiser, for engines that run them faster than denoiser.onnx.

    denoiser.onnx           the portable graph, which every engine can run
    denoiser.<name>.onnx    what some engines run instead: float where integers are slower, or other Q/DQ placement

The manifest's graph entry lists them: variants: {engine: {file, precision, bytes, bytes_by_precision, parity}}.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.targets.precision import precision_of
from diffpress.export.verify.parity import ParityCase, check_parity
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.errors import InvalidInputError, unknown_name

FLOAT = "float"


@dataclass(frozen=True)
class Variant:
    """Graph that replaces denoiser.onnx in `engines` (names of diffpress.runtime.engines).

    `quantization` is what the graph computes, None for float.
    """

    name: str
    engines: tuple[str, ...]
    graph: Graph
    quantization: Quantization | None

    @property
    def file(self) -> str:
        """File name in the bundle."""
        return f"denoiser.{self.name}.onnx"


def check_variants(variants: Sequence[Variant]) -> None:
    """Check that every engine exists and has at most one variant.

    Raises:
        InvalidInputError: Otherwise.
    """
    engines = [engine for variant in variants for engine in variant.engines]
    for engine in engines:
        if engine not in ENGINES:
            raise unknown_name("engine", engine, ENGINES)
        if engines.count(engine) > 1:
            raise InvalidInputError(
                f"engine '{engine}': has variants {_names(variants, engine)}, but an engine runs only one graph"
            )


def write_variants(
    checkpoint: Checkpoint, variants: Sequence[Variant], folder: Path, trial: ParityCase, threads: int | None = None
) -> dict[str, dict[str, Any]]:
    """Write the variants into a bundle's folder and check their parity.

    Returns:
        Engine -> manifest entry.

    Raises:
        GateFailedError: If an engine's output from its variant differs from torch's (export/verify/parity.py).
    """
    entries = {}
    for variant in variants:
        path, variant_checkpoint = folder / variant.file, checkpoint.evolve(quantization=variant.quantization)
        size = save_graph(variant.graph, path)
        # output corrections apply to the quantized graph only
        plan = trial.spec.plan if variant.quantization else trial.spec.plan.without_corrections
        variant_trial = replace(trial, spec=trial.spec.with_plan(plan))
        parity = check_parity(variant_checkpoint, path, variant_trial, engines=list(variant.engines), threads=threads)
        for engine in variant.engines:
            entries[engine] = {
                "file": variant.file,
                "precision": precision_of(variant.quantization),
                "bytes": size,
                "bytes_by_precision": bytes_by_precision(variant.graph),
                "parity": parity[engine],
            }
    return dict(sorted(entries.items()))


def bytes_by_precision(graph: Graph) -> dict[str, int]:
    """Return numpy dtype name -> bytes of all initializers of that dtype, the largest first."""
    found: dict[str, int] = {}
    for tensor in graph.proto.graph.initializer:
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).name
        weight = graph.weights.get(tensor.name)
        size = onnx.numpy_helper.to_array(tensor).nbytes if weight is None else weight.nbytes
        found[dtype] = found.get(dtype, 0) + size
    return dict(sorted(found.items(), key=lambda entry: (-entry[1], entry[0])))


def _names(variants: Sequence[Variant], engine: str) -> str:
    return " and ".join(f"'{variant.name}'" for variant in variants if engine in variant.engines)
