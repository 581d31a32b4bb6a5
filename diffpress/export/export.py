"""A checkpoint in, a bundle out: fold timesteps, measure int8 against float, write the bundle."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

from diffpress.compress.checkpoint import Checkpoint
from diffpress.export.bundle import check_output_folder, check_precision, check_targets, checked_engines, write_bundle
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.passes.fold_timesteps import fold_timesteps
from diffpress.export.passes.insert_qdq import insert_qdq
from diffpress.export.verify.latency import float_variants, measure_latency
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.pipeline import resized

logger = logging.getLogger(__name__)


def export(
    checkpoint: Checkpoint,
    out: str | Path,
    *,
    targets: Sequence[str] = ("onnx",),
    precision: str = "fp32",
    size: tuple[int, int] | None = None,
    fixed_timesteps: bool = False,
    revert_slower: bool = False,
    compute_capabilities: Sequence[str] = (),
    build: BuildOptions | None = None,
    threads: int | None = None,
) -> Bundle:
    """Export a checkpoint as a bundle.

    Arguments and errors are those of `diffpress.api.export`, which also loads the checkpoint. `out` is checked before
    any work, since tracing may take minutes.
    """
    out, build, fixed_size = Path(out), build or BuildOptions(), size is not None
    check_output_folder(out)
    if size is not None:
        checkpoint = checkpoint.evolve(spec=resized(checkpoint.spec, size))
    check_targets(targets, compute_capabilities, build)
    check_precision(precision, checkpoint.quantization is not None, targets)
    graph, variants = None, []
    if fixed_timesteps:
        checkpoint, graph = fold_timesteps(checkpoint, to_onnx(checkpoint, fixed_size))
    if checkpoint.quantization is not None:
        graph = graph or to_onnx(checkpoint, fixed_size)
        rounded = insert_qdq(graph, checkpoint.quantization)
        engines = dict.fromkeys(checked_engines(True, targets), rounded)
        latencies = measure_latency(checkpoint, graph, engines, threads, fixed_size)
        for latency in latencies:
            logger.info(str(latency))
        variants = float_variants(graph, latencies) if revert_slower else []
    return write_bundle(
        checkpoint,
        out,
        targets,
        float_graph=graph,
        variants=variants,
        capabilities=compute_capabilities,
        threads=threads,
        fixed_size=fixed_size,
        precision=precision,
        build=build,
    )
