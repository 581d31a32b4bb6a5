"""Parity of engines with torch over one full trajectory: same noise, conditioning and sampling plan.

    max_abs   max |engine - torch|  over the final samples
    sqnr_db   10 log10(sum torch^2 / sum (engine - torch)^2)  of each final sample, averaged over samples

Both compare with the float torch model. A float graph must stay within MAX_ABS, relative to the largest value if that
exceeds 1; a half-precision graph must reach HALF_SQNR_DB. A quantized graph is compared with torch's own fake
quantization: its SQNR may be at most WITHIN_DB lower. A single evaluation is not sufficient: rounding errors that one
step hides are fed back into the next.

A small pixel-space model is tested under its own plan. A latent model may have gigabytes of weights and take a minute
per evaluation: it is tested on fewer and smaller samples, with just enough steps to show the feedback. The manifest
records how many.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.components import Component
from diffpress.compress.models.counts import is_large
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.export.verify.float16_range import Probed, write_probed
from diffpress.runtime.engines import Engine, available, load_engine
from diffpress.runtime.engines.onnxruntime import engine as onnxruntime_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import GateFailedError
from diffpress.runtime.network_inputs import Network, dummy_conditioning
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

SAMPLES = 16  # with four samples, the SQNR varies by 1 dB between draws
MAX_ABS = 1e-3
WITHIN_DB = 1.0
COMPONENT_SQNR_DB = {"fp32": 60.0, "fp16": 45.0, "bf16": 30.0}

# between the cost of rounding (55 to 70 dB in fp16, 18 dB less in bf16) and that of a missing fp32 fallback
HALF_SQNR_DB = {"fp16": 40.0, "bf16": 22.0}

# ONNX Runtime has no kernels for bfloat16 on the CPU (1.32: no Conv, Gemm, MatMul or Add)
CANNOT_RUN = {"bf16": (onnxruntime_engine.NAME,)}

# above this, one engine is tested, and its weights stay in the file: a second packed copy might not fit in memory
LARGE_BYTES = 4 * 2**30

# for latent models
LATENT_SAMPLES, LATENT_STEPS, LATENT_SIDE = 2, 4, 16
LATENT_WITHIN_DB = 3.0  # two samples vary more than sixteen

FAKE_QUANT = "torch_fake_quant"

Parity = dict[str, dict[str, float]]


@dataclass(frozen=True)
class ParityCase:
    """Parity test case: `samples` samples under the spec's plan at the spec's size."""

    spec: DenoiserSpec
    samples: int
    within_db: float

    @property
    def uncorrected(self) -> ParityCase:
        """The case without output corrections, which apply to the quantized network only."""
        return replace(self, spec=self.spec.with_plan(self.spec.plan.without_corrections))


@dataclass(frozen=True)
class Reference:
    """Torch's samples of a test case, to which engines are compared.

    Attributes:
        case: The test case.
        exact: Samples of the float model [N, C, H, W].
        fake_quant: Samples of the fake-quantized model; None for a graph that is not quantized.
    """

    case: ParityCase
    exact: np.ndarray
    fake_quant: np.ndarray | None = None

    @property
    def of_float_graph(self) -> Reference:
        """The reference of the graph before quantization."""
        return Reference(self.case.uncorrected, self.exact)


def parity_case_for(model: nn.Module, spec: DenoiserSpec, fixed_size: bool = False) -> ParityCase:
    """Return the parity test case for a model (see the module docstring)."""
    if spec.is_pixel_space and not is_large(model):
        return ParityCase(spec, SAMPLES, WITHIN_DB)
    if adapter_for(model).resizable and not fixed_size:
        side = max(2, LATENT_SIDE // spec.size_multiple) * spec.size_multiple
        channels, height, width = spec.sample_shape
        spec = replace(spec, sample_shape=(channels, min(side, height), min(side, width)))
    stride = -(-spec.plan.steps // LATENT_STEPS)
    plan = spec.plan.over(spec.plan.timesteps[::stride])
    return ParityCase(spec.with_plan(plan), LATENT_SAMPLES, LATENT_WITHIN_DB)


def torch_reference(checkpoint: Checkpoint, case: ParityCase) -> Reference:
    """Sample the test case with the checkpoint's model, and with its fake-quantized model if it is quantized."""
    uncorrected = case.uncorrected
    exact = _samples(TorchNetwork(checkpoint.model, uncorrected.spec), uncorrected)
    if checkpoint.quantization is None:
        return Reference(case, exact)
    return Reference(case, exact, _samples(TorchNetwork(fake_quantized(checkpoint), case.spec), case))


def check_parity(
    graph: Path,
    reference: Reference,
    *,
    engines: Sequence[str] | None = None,
    threads: int | None = None,
    precision: str = "fp32",
) -> Parity:
    """Compare an ONNX file with torch.

    Args:
        graph: The ONNX file.
        reference: Torch's samples.
        engines: Engines to test; by default all installed ones that support `precision`.
        threads: Threads of the engines.
        precision: The precision that the graph computes in.

    Returns:
        {engine: {max_abs, sqnr_db, samples, steps}}, plus a row 'torch_fake_quant' for a quantized checkpoint.

    Raises:
        GateFailedError: If an engine deviates by more than the bounds above.
    """
    case, exact = reference.case, reference.exact
    measured = {} if reference.fake_quant is None else {FAKE_QUANT: _compared(exact, reference.fake_quant, case)}
    large = _bytes(graph) >= LARGE_BYTES
    for name in _engines(precision, large) if engines is None else engines:
        lean = large and name == onnxruntime_engine.NAME
        with _opened(graph, name, threads, lean, precision) as engine:
            measured[name] = _compared(exact, _samples(engine, case), case)
    for name, row in measured.items():
        _check_row(f"{graph.name} in {name}", row, reference, measured.get(FAKE_QUANT), precision)
    return measured


def _check_row(
    where: str, row: dict[str, float], reference: Reference, fake_quant: dict[str, float] | None, precision: str
) -> None:
    """Check an engine's row; raises GateFailedError."""
    within_db = reference.case.within_db
    allowed = MAX_ABS * max(1.0, float(np.abs(reference.exact).max()))
    if fake_quant is None and precision in HALF_SQNR_DB:
        _check_sqnr(where, row["sqnr_db"], HALF_SQNR_DB[precision])
    elif fake_quant is None and not row["max_abs"] <= allowed:
        raise GateFailedError(
            f"{where}: samples differ from torch's by up to {row['max_abs']:.2g} "
            f"({row['sqnr_db']:.1f} dB); the limit is {allowed:.2g}"
        )
    elif fake_quant is not None and not row["sqnr_db"] >= fake_quant["sqnr_db"] - within_db:
        raise GateFailedError(
            f"{where}: {row['sqnr_db']:.1f} dB SQNR to the float model (largest difference "
            f"{row['max_abs']:.2g}), torch's fake quantization has {fake_quant['sqnr_db']:.1f} dB and "
            f"at most {within_db:g} dB less is allowed"
        )


def runs(precision: str) -> list[str]:
    """Return installed engines that run graphs in this precision; not TensorRT, which is built later."""
    return [name for name in available() if name not in (*CANNOT_RUN.get(precision, ()), "tensorrt")]


def check_component(
    component: Component,
    graph: Path,
    *,
    engines: list[str] | None = None,
    threads: int | None = None,
    precision: str = "fp32",
) -> dict[str, float]:
    """Compare a component's graph with torch.

    Returns:
        {engine: SQNR in dB of the output with the lowest SQNR}.

    Raises:
        GateFailedError: If it is below COMPONENT_SQNR_DB.
    """
    inputs = {name: tensor.numpy() for name, tensor in component.examples.items()}
    expected, found = component.run_all(inputs), {}
    for name in runs(precision) if engines is None else engines:
        with _opened(graph, name, threads, lean=False, precision=precision) as engine:
            outputs = engine.run_all(inputs)
        found[name] = round(min(mean_sqnr_db(expected[key], outputs[key]) for key in expected), 1)
        _check_sqnr(f"{graph.name} in {name}", found[name], COMPONENT_SQNR_DB[precision])
    return found


def _check_sqnr(where: str, sqnr_db: float, least: float) -> None:
    if not sqnr_db >= least:  # NaN is not
        raise GateFailedError(f"{where}: {sqnr_db:.1f} dB SQNR to torch, {least:g} dB are required")


def _engines(precision: str, large: bool) -> list[str]:
    able = runs(precision)
    return [onnxruntime_engine.NAME] if large and onnxruntime_engine.NAME in able else able


@contextmanager
def _opened(graph: Path, name: str, threads: int | None, lean: bool, precision: str) -> Iterator[Engine | Probed]:
    """Open the engine; in fp16, ONNX Runtime also checks the float16 range at the end (GateFailedError)."""
    options = EngineOptions(lean=lean)
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


def _samples(network: Network, case: ParityCase) -> np.ndarray:
    conditioning = dummy_conditioning(case.spec, case.samples)
    return generate(network, case.spec, range(case.samples), batch=case.samples, conditions=conditioning)


def _compared(exact: np.ndarray, samples: np.ndarray, case: ParityCase) -> dict[str, float]:
    """Return the measurements, rounded so that they are reproducible."""
    largest = float(np.abs(samples - exact).max())
    return {
        "max_abs": float(f"{largest:.1e}"),
        "sqnr_db": round(mean_sqnr_db(exact, samples), 1),
        "samples": case.samples,
        "steps": case.spec.plan.steps,
    }
