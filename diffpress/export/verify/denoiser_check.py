"""Verify all graphs of a denoiser in a bundle's folder: parity with torch, and what precision engines executed.

Graphs are verified in the engines that run them. TensorRT engines are not run: a quantized graph for TensorRT in half
precision is verified on the CPU (bfloat16 as its float32 equivalent, at the opset before bfloat16 raised it: from opset
21 on ONNX Runtime cannot load int8 activations); in float32 it differs from denoiser.onnx only in form.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from diffpress.compress.config import ExportConfig
from diffpress.export.denoiser import Denoiser, TargetGraph
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.opsets import opset_of
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.half_precision import FLOAT
from diffpress.export.targets.capability import emulated, expected_integer_layers
from diffpress.export.targets.precision import layer_formats
from diffpress.export.targets.tensorrt import ENGINE as TENSORRT
from diffpress.export.verify.engine_check import check_engine
from diffpress.export.verify.gate import ParityFailure, ParityGate
from diffpress.export.verify.parity import Parity, ParityResult, check_parity, runs
from diffpress.export.verify.reference import Reference, torch_reference


@dataclass(frozen=True)
class Verified:
    """What was measured of a denoiser's graphs.

    Attributes:
        parity: Parity of denoiser.onnx.
        variants: File -> parity of each other graph; empty if it was not run.
        engines: Manifest entries of the engines that were checked.
        slots: File of a graph with slots for LoRAs -> its parity, with no LoRA in them.
        failures: What failed, in any engine.
    """

    parity: Parity
    variants: dict[str, Parity]
    engines: list[dict[str, Any]]
    slots: dict[str, Parity] = field(default_factory=dict)
    failures: tuple[ParityFailure, ...] = ()


def verify_denoiser(
    denoiser: Denoiser,
    folder: Path,
    sizes: Mapping[str, int],
    config: ExportConfig,
    gate: ParityGate,
    slots: Mapping[str, dict[str, Any]] = MappingProxyType({}),
) -> Verified:
    """Verify the denoiser's graphs, which were written to `folder`.

    `sizes` are the bytes of each file, and `slots` the manifest entries of their forms with slots for LoRAs.
    """
    portable, threads = denoiser.portable, config.threads
    reference = torch_reference(denoiser.checkpoint, denoiser.case)

    def parity_of(file: str) -> ParityResult:
        engines, precision = portable_engines(denoiser), portable.float_precision
        return check_parity(folder / file, reference, engines=engines, threads=threads, precision=precision, gate=gate)

    found = parity_of(portable.file)
    with_slots = {
        entry["file"]: parity_of(entry["file"])
        if file == portable.file
        else _variant_parity(
            replace(next(one for one in denoiser.variants if one.file == file), file=entry["file"]),
            denoiser,
            folder,
            reference,
            threads,
            gate,
        )
        for file, entry in slots.items()
    }
    checked = {one.file: _variant_parity(one, denoiser, folder, reference, threads, gate) for one in denoiser.variants}
    others = [*checked.values(), *with_slots.values()]
    failures = (*found.failures, *(failure for result in others for failure in result.failures))
    cannot_run = {(failure.graph, failure.engine) for failure in failures if failure.sqnr_db is None}
    reports = []
    for engine in checked_engines(portable.quantization is not None, config.targets):
        run = denoiser.graph_for(engine)
        if (run.file, engine) in cannot_run:
            continue
        integer_layers = expected_integer_layers(run.quantization)
        report = check_engine(engine, folder / run.file, denoiser.case.spec, sizes[run.file], integer_layers)
        reports.append(report | {"emulated": emulated(layer_formats(run.quantization).values())})
    variants = {file: result.rows for file, result in checked.items()}
    slot_rows = {file: result.rows for file, result in with_slots.items()}
    return Verified(found.rows, variants, reports, slot_rows, failures)


def checked_engines(quantized: bool, targets: Sequence[str]) -> list[str]:
    """Return the engines whose executed precision is recorded in the manifest for these targets."""
    engines = ["openvino"] if "openvino" in targets else []
    # every bundle runs in ONNX Runtime, as parity has shown; only quantized ones need a precision report there
    return [*engines, "onnxruntime"] if quantized else engines


def portable_engines(denoiser: Denoiser) -> list[str] | None:
    """Return the installed engines that can run denoiser.onnx, if one of them cannot; None for the default."""
    cannot = {
        engine
        for variant in denoiser.variants
        for engine in variant.engines
        if variant.quantization is not None and engine != TENSORRT
    }
    return [name for name in runs(denoiser.portable.float_precision) if name not in cannot] if cannot else None


def _variant_parity(
    variant: TargetGraph,
    denoiser: Denoiser,
    folder: Path,
    reference: Reference,
    threads: int | None,
    gate: ParityGate,
) -> ParityResult:
    """Check a graph that some engines run instead of denoiser.onnx; no rows if it cannot be run here."""
    path, precision = folder / variant.file, variant.float_precision
    if TENSORRT not in variant.engines:
        if variant.quantization is None:
            reference = reference.of_float_graph
        else:  # fewer layers than in denoiser.onnx
            quantized = denoiser.checkpoint.evolve(quantization=variant.quantization)
            reference = torch_reference(quantized, denoiser.case)
        return check_parity(path, reference, engines=variant.engines, threads=threads, precision=precision, gate=gate)
    if precision == FLOAT:
        return ParityResult({})
    engines = runs(precision)[-1:]  # ONNX Runtime if it runs the precision: it computes exactly what the graph says
    if precision != "bf16":
        return check_parity(path, reference, engines=engines, threads=threads, precision=precision, gate=gate)
    wide = path.with_name(f"{path.name}.{FLOAT}")
    try:
        save_graph(_at_opset_of(denoiser.portable.graph, lower(variant.graph, "check", PassContext())), wide)
        return check_parity(wide, reference, engines=runs(FLOAT)[-1:], threads=threads, precision=precision, gate=gate)
    finally:
        for file in path.parent.glob(f"{wide.name}*"):
            file.unlink()


def _at_opset_of(portable: Graph, graph: Graph) -> Graph:
    """Return `graph`, which is modified, at the opset of the portable one, which has the same formats and operators."""
    entry = next(entry for entry in graph.proto.opset_import if entry.domain in ("", "ai.onnx"))
    entry.version = opset_of(portable)
    return graph
