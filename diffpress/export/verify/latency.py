"""Latency of the quantized graph relative to the float graph in each engine, measured in alternation.

    latency_ratio = median time of the quantized graph / median time of the float graph      slower if above SLOWER

Timings are not reproducible, but a bundle must be. They are printed and stored beside the bundle; the bundle contains
only the decision which engines run the float graph (export/targets/variants.py).
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.counts import is_large
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.targets.precision import precision_of
from diffpress.export.targets.variants import FLOAT, Variant
from diffpress.export.verify.parity import parity_case_for
from diffpress.runtime.engines import Engine, load_engine
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


def measure_latency(
    checkpoint: Checkpoint,
    float_graph: Graph,
    quantized: Mapping[str, Graph],
    threads: int | None = None,
    fixed_size: bool = False,
) -> list[Latency]:
    """Time the checkpoint's float graph against `quantized`, engine -> the graph it would run.

    Returns an empty list for models of more than 100 million parameters (with a message): two copies may not fit into
    memory, and one evaluation takes seconds.
    """
    if is_large(checkpoint.model):
        logger.info("latency not measured for more than 100 million parameters; use 'diffpress bench'")
        return []
    spec, precision = parity_case_for(checkpoint, fixed_size).spec, precision_of(checkpoint.quantization)
    with TemporaryDirectory() as folder:
        files: dict[int, Path] = {}
        for graph in (float_graph, *quantized.values()):
            if id(graph) not in files:
                files[id(graph)] = Path(folder) / f"{len(files)}.onnx"
                save_graph(graph, files[id(graph)])
        found = []
        for name, graph in quantized.items():
            with (
                closing(load_engine(files[id(float_graph)], name, threads)) as exact,
                closing(load_engine(files[id(graph)], name, threads)) as rounded,
            ):
                times = alternating_latency_ms((exact, rounded), dummy_inputs(exact, spec, BATCH))
                found.append(Latency(name, precision, *times))
    return found


def alternating_latency_ms(engines: Sequence[Engine], inputs: dict[str, np.ndarray]) -> list[float]:
    """Return median milliseconds of one evaluation per engine; alternating spreads other load evenly."""
    for engine in engines:
        engine.run(inputs)
    times: list[list[float]] = [[] for _ in engines]
    began = time.perf_counter()
    while len(times[0]) < ROUNDS or (len(times[0]) < MAX_ROUNDS and _ms_since(began) < ENOUGH_MS):
        for engine, measured in zip(engines, times, strict=True):
            start = time.perf_counter()
            engine.run(inputs)
            measured.append(_ms_since(start))
    return [statistics.median(measured) for measured in times]


def float_variants(float_graph: Graph, latencies: Sequence[Latency]) -> list[Variant]:
    """Return the float graph as a variant for the engines in which the quantized graph is slower."""
    slower = tuple(latency.engine for latency in latencies if latency.slower)
    return [Variant(FLOAT, slower, float_graph, None)] if slower else []


def _ms_since(start: float) -> float:
    return (time.perf_counter() - start) * 1e3
