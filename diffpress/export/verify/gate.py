"""The parity gate: the SQNR to the float torch model that a denoiser's graph must reach, and the record of a failure.

    float graph        FLOAT_SQNR_DB of its precision; in fp32 every single sample must reach it
    quantized graph    that of torch's fake quantization minus `within_db`, at most FLOAT_SQNR_DB["fp32"], at least 0
    --parity-sqnr-db   replaces both

A failed gate keeps the bundle, whose manifest lists what failed under `parity_failures`. Only engines of the export's
targets fail the gate; what another installed engine cannot run is recorded and logged.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.errors import GateFailedError

logger = logging.getLogger(__name__)

# fp16 and bf16: between the cost of rounding (55 to 70 dB in fp16, 18 dB less in bf16) and that of a missing fp32
# fallback
FLOAT_SQNR_DB = {"fp32": 60.0, "fp16": 40.0, "bf16": 22.0}

# the lower end of what rounding the float layers of a quantized graph costs by itself
ROUNDING_SQNR_DB = {"fp16": 55.0, "bf16": 37.0}

# target -> the engine on the CPU that is tested for it; TensorRT engines are built later
TARGET_ENGINES = {"onnx": "onnxruntime", "openvino": "openvino"} | dict.fromkeys(
    ("sampler", "triton", "web"), "onnxruntime"
)


@dataclass(frozen=True)
class ParityFailure:
    """A graph whose output differs from torch's, or that an engine could not run.

    Attributes:
        graph: File of the graph.
        engine: The engine; 'torch' if torch's own samples are not finite.
        target: Whether the engine is one of the export's targets, so that the gate fails.
        sqnr_db: The measured SQNR; None if there is none.
        required_db: The bound; None if the graph could not be run.
        message: One line: what failed, and what to do.
    """

    graph: str
    engine: str
    target: bool
    sqnr_db: float | None
    required_db: float | None
    message: str


@dataclass(frozen=True)
class ParityGate:
    """What the parity check of an export requires.

    Attributes:
        targets: Targets of the export.
        sqnr_db: Bound in place of the built-in ones; None keeps them.
    """

    targets: Sequence[str] = ("onnx",)
    sqnr_db: float | None = None

    @property
    def engines(self) -> set[str]:
        """The engines on the CPU that the targets stand for."""
        return {TARGET_ENGINES[target] for target in self.targets if target in TARGET_ENGINES}

    def targeted(self, tested: Iterable[str]) -> set[str]:
        """Return which of the `tested` engines fail the gate: those of the targets, or all if they have none there."""
        names = set(tested)
        return self.engines & names or names

    def required_db(self, precision: str, fake_quant_db: float | None, within_db: float) -> float:
        """Return the bound of a graph; `fake_quant_db` is None for one that is not quantized."""
        if self.sqnr_db is not None:
            return self.sqnr_db
        if fake_quant_db is None:
            return FLOAT_SQNR_DB[precision]
        noise = 10 ** (-fake_quant_db / 10)
        if precision in ROUNDING_SQNR_DB:
            noise += 10 ** (-ROUNDING_SQNR_DB[precision] / 10)
        expected = -10 * math.log10(noise)
        return round(max(0.0, min(expected - within_db, FLOAT_SQNR_DB["fp32"])), 1)

    def advice(self, precision: str, sqnr_db: float, fake_quant_db: float | None) -> str:
        """Return why the bound is what it is, and what to do about an SQNR below it."""
        if self.sqnr_db is not None:
            return "by parity_sqnr_db; keep more layers in float, or lower it"
        accept = f"or accept it with --parity-sqnr-db {math.floor(sqnr_db)} (in a recipe gates.parity_sqnr_db)"
        if fake_quant_db is None and precision == "fp32":
            return f"in every sample; the graph does not compute what the model does, {accept} if the model is chaotic"
        if fake_quant_db is None:
            wider = "bf16 or fp32" if precision == "fp16" else "fp32"
            return f"in {precision}; use --precision {wider}, {accept}"
        measured = f"because torch's fake quantization has {fake_quant_db:.1f} dB"
        if sqnr_db < 0.0:
            lost = "the quantized samples are further from the float model's than zeros are"
            return f"{measured}: {lost}; keep sensitive layers in float (quantize.ignored_layers), use qat, {accept}"
        return (
            f"{measured}; the engine's integers differ from torch's: leave reduce_range on for processors without "
            f"VNNI, keep the layers concerned in float (quantize.ignored_layers), {accept}"
        )


def failures_of(bundle: Bundle) -> list[ParityFailure]:
    """Return what failed parity when the bundle was exported."""
    return [ParityFailure(**entry) for entry in bundle.manifest.get("parity_failures", [])]


def cannot_sample(bundle: Bundle) -> bool:
    """Return whether an engine of a target cannot run the bundle's denoiser, or gives no finite samples."""
    return any(failure.target and failure.sqnr_db is None for failure in failures_of(bundle))


def raise_failed(bundle: Bundle) -> None:
    """Raise GateFailedError if an engine of a target failed parity; the message names the bundle, which is kept."""
    failed = [failure.message for failure in failures_of(bundle) if failure.target]
    if failed:
        raise GateFailedError(
            f"{bundle.path}: parity failed: {'; '.join(failed)}. The bundle is kept, marked as failed"
        )


def log_failures(failures: Iterable[ParityFailure]) -> None:
    """Log the failures that do not fail the gate; the others are raised after the bundle is written."""
    for failure in failures:
        if not failure.target:
            logger.warning(f"{failure.message}; {failure.engine} is not a target, so the export continues")
