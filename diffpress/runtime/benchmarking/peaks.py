"""Peaks of this machine in an engine, measured on a few kernels: products per second by type, and memory bandwidth.

    peak of a type      MACs / time of the faster of one large matrix product and one large convolution
    bandwidth           bytes / time of a copy; small ones stay in the processor's caches, the largest does not

The times are those of the engine's own profiler, with as many threads as the profiled graph has: the best run of a
product, and for a copy, which takes only microseconds, the best mean of a few runs. They are cached, and measured again
without a cache, or for another processor, engine version or number of threads.
"""

from __future__ import annotations

import json
import math
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from diffpress.runtime.benchmarking.bench import machine
from diffpress.runtime.benchmarking.peak_kernels import convolution_graph, copy_graph, product_graph
from diffpress.runtime.engines import load_engine
from diffpress.runtime.engines.executed_layers import INT8, ExecutedLayer
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError

KERNELS_VERSION = 1  # part of the cache's key: increment it with every change of the kernels or of how they are timed
PROFILERS, RUNS = 4, 3  # short series: what a counter rounds grows with the runs that it has counted
COPIED_MIB = (0.5, 8.0, 128.0)
TYPES = {"fp32": "fp32", "bf16": "bf16", INT8: "fp32"}  # type of a product -> precision of the engine around it


@dataclass(frozen=True)
class Peaks:
    """Peaks of a machine in one engine.

    Attributes:
        gmacs: Type -> 10^9 multiply-accumulates per second; a type that the engine does not execute is missing.
        gb_s: Size of a copy in MiB -> 10^9 bytes per second, by size.
    """

    gmacs: dict[str, float]
    gb_s: dict[float, float]

    def bandwidth(self, size: int) -> float:
        """Return the GB/s for a kernel that moves `size` bytes: that of the largest copy that is not larger."""
        measured = [rate for mib, rate in self.gb_s.items() if mib * 2**20 <= size]
        return measured[-1] if measured else next(iter(self.gb_s.values()))

    def bound_ms(self, layer: ExecutedLayer) -> float:
        """Return the least time of a layer at these peaks: of its products or of its bytes, whichever is longer.

        A product of a type without a peak is bound by its bytes alone.
        """
        of_bytes = layer.bytes / self.bandwidth(layer.bytes) / 1e6
        peak = self.gmacs.get(layer.precision)
        return of_bytes if peak is None else max(of_bytes, layer.macs / peak / 1e6)

    def to_json(self) -> dict[str, Any]:
        """Convert to JSON values."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> Peaks:
        """Read what `to_json` wrote."""
        return Peaks(data["gmacs"], {float(mib): rate for mib, rate in data["gb_s"].items()})


def measured_peaks(engine: str, options: EngineOptions) -> Peaks:
    """Return the peaks in an engine, from the cache of the options if they were measured before.

    Raises:
        MissingDependencyError: The engine is not installed.
        EngineUnavailableError: The engine cannot run here, or has no profiler.
    """
    cache = None if options.cache is None else options.cache.of("peaks")
    facts = machine()
    key = json.dumps([KERNELS_VERSION, engine, options.threads, options.providers, facts["cpu"], facts["cores"]])
    key += json.dumps([facts[name] for name in ("numpy", "onnxruntime", "openvino")])
    stored = None if cache is None else cache.read(key)
    if stored is not None:
        return Peaks.from_json(json.loads(stored))
    peaks = _measured(engine, replace(options, cache=None, streams=1, rebuild=False, lean=False))
    if cache is not None:
        cache.write(key, json.dumps(peaks.to_json()).encode())
    return peaks


def _measured(engine: str, options: EngineOptions) -> Peaks:
    with TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.onnx"
        gmacs = {kind: _peak(file, engine, replace(options, precision=around), kind) for kind, around in TYPES.items()}
        sizes = {mib: copy_graph(int(mib * 2**20)) for mib in COPIED_MIB}
        copies = {mib: _timed(file, engine, replace(options, precision="fp32"), graph) for mib, graph in sizes.items()}
    rates = {mib: max(layer.bytes / ms / 1e6 for layer, ms in found if layer.bytes) for mib, found in copies.items()}
    return Peaks({kind: peak for kind, peak in gmacs.items() if peak is not None}, rates)


def _peak(file: Path, engine: str, options: EngineOptions, kind: str) -> float | None:
    """Return the GMAC/s of the faster kernel; None if the engine executes none of them in that type."""
    rates = []
    for graph in (product_graph(kind), convolution_graph(kind)):
        try:
            found = _timed(file, engine, options, graph)
        except InvalidInputError:  # the engine or this processor has no such precision
            if options.precision == "fp32":
                raise
            return None
        rates += [layer.macs / ms / 1e6 for layer, ms in found if layer.macs and layer.precision == kind]
    return max(rates, default=None)


def _timed(
    file: Path, engine: str, options: EngineOptions, graph: tuple[bytes, tuple[int, ...]]
) -> list[tuple[ExecutedLayer, float]]:
    """Return the layers of a graph with their least time, in ms."""
    data, shape = graph
    file.write_bytes(data)
    inputs = {"x": np.random.default_rng(1).standard_normal(shape, dtype=np.float32)}
    best: dict[ExecutedLayer, float] = {}
    with closing(load_engine(file, engine, options=options)) as opened:
        for _ in range(PROFILERS):
            profiler = opened.profiler(inputs)
            for _ in range(RUNS + 1):
                profiler.run()
            layers, totals = profiler.finish()
            for layer, times in zip(layers, np.diff(totals, axis=0).T, strict=True):
                ms = float(times.min() if layer.macs else times.mean())
                best[layer] = min(ms, best.get(layer, math.inf))
    return [(layer, ms) for layer, ms in best.items() if ms > 0.0]
