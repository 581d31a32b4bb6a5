"""Latency of the quantized graph relative to the float graph in each engine, measured in alternation.

    latency_ratio = median time of the quantized graph / median time of the float graph      slower if above SLOWER

Timings are not reproducible, but a bundle must be. They are logged and stored beside the bundle; the bundle contains
only the decision which engines run the float graph (export/denoiser.py).
"""

from __future__ import annotations

import logging
import statistics
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from diffpress.compress.models.counts import is_large
from diffpress.export.denoiser import Denoiser
from diffpress.export.graph.model import save_graph
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.engines import Engine, load_engine
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json, write_json
from diffpress.runtime.network_inputs import dummy_inputs

logger = logging.getLogger(__name__)

BATCH = 8
ROUNDS, MAX_ROUNDS, ENOUGH_MS = 5, 30, 2000.0

# ratios up to this are noise, and the smaller file is preferred
SLOWER = 1.02


@dataclass(frozen=True)
class Latency:
    """Median milliseconds of one evaluation at batch size BATCH."""

    engine: str
    precision: str
    float_ms: float
    quantized_ms: float

    @property
    def latency_ratio(self) -> float:
        """Time of the quantized graph divided by that of the float graph."""
        return self.quantized_ms / self.float_ms

    @property
    def slower(self) -> bool:
        """Whether the quantized graph is slower by more than the measurement noise."""
        return self.latency_ratio > SLOWER

    def __str__(self) -> str:
        times = f"{self.quantized_ms:.1f} ms against {self.float_ms:.1f} ms a step, batch {BATCH}"
        verdict = "slower" if self.slower else "faster" if self.latency_ratio < 1 / SLOWER else "no gain"
        return f"{self.precision} is {self.latency_ratio:.2f}x of fp32 in {self.engine}: {verdict} ({times})"


def measure_latency(denoiser: Denoiser, engines: Sequence[str], threads: int | None = None) -> list[Latency]:
    """Time the denoiser's float graph against the quantized graph that each engine runs.

    Returns an empty list for models that are not quantized, and for models of more than 100 million parameters (with a
    message): two copies may not fit into memory, and one evaluation takes seconds.
    """
    if denoiser.portable.quantization is None:
        return []
    if is_large(denoiser.checkpoint.model):
        logger.info("latency not measured for more than 100 million parameters; use 'diffpress bench'")
        return []
    found = []
    with TemporaryDirectory() as folder:
        float_file, quantized_file = Path(folder) / "float.onnx", Path(folder) / "quantized.onnx"
        save_graph(denoiser.float_graph, float_file)
        for name in engines:
            quantized = denoiser.graph_for(name)
            save_graph(quantized.graph, quantized_file)
            try:
                with (
                    closing(load_engine(float_file, name, threads)) as exact,
                    closing(load_engine(quantized_file, name, threads)) as rounded,
                ):
                    times = alternating_latency_ms((exact, rounded), dummy_inputs(exact, denoiser.case.spec, BATCH))
            except InvalidInputError as error:  # the parity check reports an engine that cannot run the graph
                logger.warning(f"{name}: latency not measured: {error}")
                continue
            found.append(Latency(name, quantized.precision, *times))
    return found


def alternating_latency_ms(engines: Sequence[Engine], inputs: dict[str, np.ndarray]) -> list[float]:
    """Return median milliseconds of one evaluation per engine; alternating spreads other load evenly."""
    for engine in engines:
        engine.run(inputs)
    works = [partial(engine.run, inputs) for engine in engines]
    times = alternating_times_ms(works, ROUNDS, max_rounds=MAX_ROUNDS, enough_ms=ENOUGH_MS)
    return [statistics.median(measured) for measured in times]


def slower_engines(latencies: Sequence[Latency]) -> list[str]:
    """Return the engines in which the quantized graph is slower."""
    return [latency.engine for latency in latencies if latency.slower]


def read_latencies(file: Path, key: dict[str, Any]) -> list[Latency] | None:
    """Return the latencies stored in `file` under these facts, None if there are none.

    Measuring again would give other numbers, and possibly another bundle.
    """
    stored = read_json(file) if file.is_file() else {}
    if any(stored.get(name) != value for name, value in key.items()):
        return None
    return [Latency(row["engine"], row["precision"], row["float_ms"], row["quantized_ms"]) for row in stored["engines"]]


def write_latencies(file: Path, key: dict[str, Any], latencies: Sequence[Latency]) -> None:
    """Store latencies with the facts that they belong to."""
    derived = ("latency_ratio", "slower")
    rows = [asdict(latency) | {name: getattr(latency, name) for name in derived} for latency in latencies]
    write_json(file, {**key, "batch": BATCH, "engines": rows})
