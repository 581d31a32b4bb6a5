"""Verify all graphs of a denoiser in a bundle's folder: parity with torch, and what precision engines executed.

Graphs are verified in the engines that run them. TensorRT engines are not run: a quantized graph for TensorRT in half
precision is verified on the CPU (bfloat16 as its float32 equivalent); in float32 it differs from denoiser.onnx only in
form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffpress.compress.config import ExportConfig
from diffpress.export.denoiser import Denoiser, TargetGraph
from diffpress.export.graph.model import save_graph
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.half_precision import FLOAT
from diffpress.export.targets.capability import emulated, expected_integer_layers
from diffpress.export.targets.precision import layer_formats
from diffpress.export.verify.engine_check import check_engine
from diffpress.export.verify.parity import Parity, Reference, check_parity, runs, torch_reference


@dataclass(frozen=True)
class Verified:
    """What was measured of a denoiser's graphs.

    Attributes:
        parity: Parity of denoiser.onnx.
        variants: File -> parity of each other graph; empty if it was not run.
        engines: Manifest entries of the engines that were checked.
    """

    parity: Parity
    variants: dict[str, Parity]
    engines: list[dict[str, Any]]


def verify_denoiser(denoiser: Denoiser, folder: Path, sizes: Mapping[str, int], config: ExportConfig) -> Verified:
    """Verify the denoiser's graphs, which were written to `folder`; `sizes` are the bytes of each file.

    Raises:
        GateFailedError: If an engine's output differs from torch's.
    """
    portable, threads = denoiser.portable, config.threads
    reference = torch_reference(denoiser.checkpoint, denoiser.case)
    parity = check_parity(folder / portable.file, reference, threads=threads, precision=portable.float_precision)
    variants = {variant.file: _variant_parity(variant, folder, reference, threads) for variant in denoiser.variants}
    reports = []
    for engine in checked_engines(portable.quantization is not None, config.targets):
        run = denoiser.graph_for(engine)
        integer_layers = expected_integer_layers(run.quantization)
        report = check_engine(engine, folder / run.file, denoiser.case.spec, sizes[run.file], integer_layers)
        reports.append(report | {"emulated": emulated(layer_formats(run.quantization).values())})
    return Verified(parity, variants, reports)


def checked_engines(quantized: bool, targets: Sequence[str]) -> list[str]:
    """Return the engines whose executed precision is recorded in the manifest for these targets."""
    engines = ["openvino"] if "openvino" in targets else []
    # every bundle runs in ONNX Runtime, as parity has shown; only quantized ones need a precision report there
    return [*engines, "onnxruntime"] if quantized else engines


def _variant_parity(variant: TargetGraph, folder: Path, reference: Reference, threads: int | None) -> Parity:
    path, precision = folder / variant.file, variant.float_precision
    if variant.quantization is None:
        return check_parity(path, reference.of_float_graph, engines=variant.engines, threads=threads)
    if precision == FLOAT:
        return {}
    if precision != "bf16":
        return check_parity(path, reference, engines=runs(precision)[-1:], threads=threads, precision=precision)
    wide = path.with_name(f"{path.name}.{FLOAT}")
    save_graph(lower(variant.graph, "check", PassContext()), wide)
    parity = check_parity(wide, reference, engines=runs(FLOAT)[-1:], threads=threads)
    for file in path.parent.glob(f"{wide.name}*"):
        file.unlink()
    return parity
