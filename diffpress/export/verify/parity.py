"""Parity of engines with torch over one full trajectory: same noise, conditioning and sampling plan.

    max_abs   max |engine - torch|  over the final samples
    sqnr_db   10 log10(sum torch^2 / sum (engine - torch)^2)  of each final sample, averaged over samples

Both compare with the float torch model. A single evaluation is not sufficient: rounding errors that one step hides are
fed back into the next. What is required is in verify/gate.py, what is sampled in verify/reference.py.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Protocol

import numpy as np
import onnx

from diffpress.compress.evaluation.metrics import mean_sqnr_db, sqnr_db
from diffpress.export.passes.cut_graph import cached_file
from diffpress.export.verify.float16_range import Probed, write_probed
from diffpress.export.verify.gate import ParityFailure, ParityGate
from diffpress.export.verify.reference import ParityCase, Reference, first_not_finite, samples_of
from diffpress.runtime.engines import Engine, available, load_engine
from diffpress.runtime.engines.onnxruntime import engine as onnxruntime_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.split import SplitEngine
from diffpress.runtime.errors import GateFailedError, InvalidInputError

logger = logging.getLogger(__name__)

COMPONENT_SQNR_DB = {"fp32": 60.0, "fp16": 45.0, "bf16": 30.0}
COMPONENT_WITHIN_DB = 3.0  # of torch's fake quantization; the examples are few

# ONNX Runtime has no kernels for bfloat16 on the CPU (1.32: no Conv, Gemm, MatMul or Add)
CANNOT_RUN = {"bf16": (onnxruntime_engine.NAME,)}

# above this, one engine is tested, and its weights stay in the file: a second packed copy might not fit in memory
LARGE_BYTES = 4 * 2**30

FAKE_QUANT = "torch_fake_quant"

BUILT_IN = ParityGate()

Parity = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ParityResult:
    """The rows of the engines that could be compared, and what failed."""

    rows: Parity
    failures: tuple[ParityFailure, ...] = ()


def check_parity(
    graph: Path,
    reference: Reference,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    precision: str = "fp32",
    gate: ParityGate = BUILT_IN,
) -> ParityResult:
    """Compare a denoiser's ONNX file with torch.

    Args:
        graph: The ONNX file.
        reference: Torch's samples.
        engines: Engines to test; by default all installed ones that support `precision`.
        threads: Threads of the engines.
        precision: The precision that the graph's float layers compute in.
        gate: What is required, and of which engines.

    Returns:
        Rows {engine: {max_abs, sqnr_db, samples, steps}} of the engines that gave finite samples, plus a row
        'torch_fake_quant' for a quantized checkpoint, and what failed.
    """
    if reference.not_finite:
        message = f"{graph.name} cannot be verified: {reference.not_finite}; check the weights and the sampling plan"
        return ParityResult({}, (ParityFailure(graph.name, "torch", True, None, None, message),))
    rows: Parity = {}
    fake_quant_db = None
    if reference.fake_quant is not None:
        rows[FAKE_QUANT] = _compared(reference, reference.fake_quant)
        fake_quant_db = rows[FAKE_QUANT]["sqnr_db"]
    large = _bytes(graph) >= LARGE_BYTES
    names = _engines(precision, large, gate) if engines is None else engines
    required_db = gate.required_db(precision, fake_quant_db, reference.case.within_db)
    failures: list[ParityFailure] = []
    for name in names:
        fail = partial(ParityFailure, graph.name, name, name in gate.targeted(names))
        where, lean = f"{graph.name} in {name}", large and name == onnxruntime_engine.NAME
        try:
            samples = _finite_samples(graph, name, reference.case, threads, lean, precision)
        except (InvalidInputError, GateFailedError) as error:
            failures.append(fail(None, None, f"{where}: {error}"))
            continue
        rows[name] = _compared(reference, samples)
        measured_db = rows[name]["sqnr_db"]
        if gate.sqnr_db is None and fake_quant_db is None and precision == "fp32":
            measured_db = round(min(map(sqnr_db, reference.exact, samples)), 1)
        if not measured_db >= required_db:
            advice = gate.advice(precision, measured_db, fake_quant_db)
            found = f"{measured_db:.1f} dB SQNR to torch (largest difference {rows[name]['max_abs']:.2g})"
            failures.append(
                fail(measured_db, required_db, f"{where}: {found}, {required_db:g} dB are required {advice}")
            )
    _warn_of_negative_sqnr(graph.name, rows)
    return ParityResult(rows, tuple(failures))


def runs(precision: str) -> list[str]:
    """Return installed engines that run graphs in this precision; not TensorRT, which is built later."""
    return [name for name in available() if name not in (*CANNOT_RUN.get(precision, ()), "tensorrt")]


class TorchGraph(Protocol):
    """What a graph is compared with: a component, or another network in torch."""

    @property
    def example_arrays(self) -> dict[str, np.ndarray]:
        """Example inputs."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs for one batch by name."""


def check_component(
    component: TorchGraph,
    graph: Path,
    quantized: TorchGraph | None = None,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    precision: str = "fp32",
    gate: ParityGate = BUILT_IN,
) -> tuple[dict[str, float], tuple[ParityFailure, ...]]:
    """Compare a component's graph with torch.

    Args:
        component: The float component.
        graph: The graph's file.
        quantized: The fake-quantized component, if the graph is quantized.
        engines: Engines to test; by default all installed ones that support `precision`.
        threads: Processor threads of the engines.
        precision: Precision of the float layers.
        gate: The parity gate.

    Returns:
        {engine: SQNR in dB of the output with the lowest SQNR}, and what failed: COMPONENT_SQNR_DB is required; of a
        quantized graph, the SQNR of torch's fake quantization minus COMPONENT_WITHIN_DB, if that is lower.
    """
    inputs = component.example_arrays
    names = runs(precision) if engines is None else engines
    expected, required_db = component.run_all(inputs), COMPONENT_SQNR_DB[precision]
    if quantized is not None:
        fake_quant_db = _lowest_db(expected, quantized.run_all(inputs))
        if not np.isfinite(fake_quant_db):
            message = f"{graph.name}: torch's fake quantization gives NaN; leave it out of quantize.components"
            return {}, (ParityFailure(graph.name, "torch", True, None, None, message),)
        required_db = round(min(required_db, max(0.0, fake_quant_db - COMPONENT_WITHIN_DB)), 1)
    found: dict[str, float] = {}
    failures: list[ParityFailure] = []
    for name in names:
        fail = partial(ParityFailure, graph.name, name, name in gate.targeted(names))
        where = f"{graph.name} in {name}"
        try:
            with _opened(graph, name, threads, lean=False, precision=precision) as engine:
                outputs = engine.run_all(inputs)
        except (InvalidInputError, GateFailedError) as error:
            failures.append(fail(None, None, f"{where}: {error}"))
            continue
        lowest_db = _lowest_db(expected, outputs)
        if not np.isfinite(lowest_db):
            failures.append(fail(None, required_db, f"{where}: {_not_finite_side(expected)} gives NaN"))
            continue
        found[name] = lowest_db
        if lowest_db < required_db:
            advice = "" if precision == "fp32" else "; use --precision fp32"
            if quantized is not None:
                advice = "; leave it out of quantize.components"
            message = f"{where}: {lowest_db:.1f} dB SQNR to torch, {required_db:g} dB are required{advice}"
            failures.append(fail(lowest_db, required_db, message))
    return found, tuple(failures)


def _lowest_db(expected: dict[str, np.ndarray], outputs: dict[str, np.ndarray]) -> float:
    """Return the SQNR in dB of the output with the lowest one."""
    return round(min(mean_sqnr_db(expected[key], outputs[key]) for key in expected), 1)


def _not_finite_side(expected: dict[str, np.ndarray]) -> str:
    return "the engine" if all(np.isfinite(array).all() for array in expected.values()) else "torch"


def _warn_of_negative_sqnr(graph: str, rows: Parity) -> None:
    for name, row in rows.items():
        if row["sqnr_db"] < 0.0:
            logger.warning(
                f"{graph} in {name}: {row['sqnr_db']:.1f} dB SQNR: the quantized samples are further from the float "
                "model's than zeros are"
            )


def _engines(precision: str, large: bool, gate: ParityGate) -> list[str]:
    """Return the engines to test: all, or one for a large graph, if possible that of a target."""
    able = runs(precision)
    if not large:
        return able
    return sorted(able, key=lambda name: (name not in gate.engines, name != onnxruntime_engine.NAME))[:1]


def _finite_samples(
    graph: Path, name: str, case: ParityCase, threads: int | None, lean: bool, precision: str
) -> np.ndarray:
    """Return an engine's samples.

    Raises:
        InvalidInputError: If the engine cannot run the graph.
        GateFailedError: If a value is not finite or exceeds the float16 range.
    """
    with _opened(graph, name, threads, lean, precision) as engine:
        samples = samples_of(engine, case)
        if not np.isfinite(samples).all():
            raise GateFailedError(
                f"the engine gives {first_not_finite(engine, case)}, where torch's samples are finite"
            )
    return samples


@contextmanager
def _opened(
    graph: Path, name: str, threads: int | None, lean: bool, precision: str
) -> Iterator[Engine | Probed | SplitEngine]:
    """Open the engine; in fp16, ONNX Runtime also checks the float16 range at the end (GateFailedError)."""
    options = EngineOptions(lean=lean)
    cached = graph.with_name(cached_file(graph.name))
    if cached.is_file():
        features = tuple(value.name for value in onnx.load(graph, load_external_data=False).graph.output)[1:]
        with (
            closing(load_engine(graph, name, threads, options=options)) as full,
            closing(load_engine(cached, name, threads, options=options)) as outer,
        ):
            yield SplitEngine(full, outer, features)
        return
    if precision != "fp16" or name != onnxruntime_engine.NAME:
        with closing(load_engine(graph, name, threads, options=options)) as engine:
            yield engine
        return
    probed_file = graph.with_name(f"{graph.name}.probed")
    try:
        nodes = write_probed(graph, probed_file)
        with closing(load_engine(probed_file, name, threads, options=options)) as engine:
            probed = Probed(engine, nodes)
            yield probed
            probed.check(graph.name)
    finally:
        probed_file.unlink(missing_ok=True)


def _bytes(graph: Path) -> int:
    """Return the size of a graph including its weights, wherever they are stored."""
    proto = onnx.load(graph, load_external_data=False)
    data_files = {entry.value for t in proto.graph.initializer for entry in t.external_data if entry.key == "location"}
    return sum(path.stat().st_size for path in (graph, *(graph.parent / file for file in data_files)))


def _compared(reference: Reference, samples: np.ndarray) -> dict[str, float]:
    """Return the measurements, rounded so that they are reproducible."""
    exact, case = reference.exact, reference.case
    largest = float(np.abs(samples - exact).max())
    return {
        "max_abs": float(f"{largest:.1e}"),
        "sqnr_db": round(mean_sqnr_db(exact, samples), 1),
        "samples": case.samples,
        "steps": case.spec.plan.steps,
    }
