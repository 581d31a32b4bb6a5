"""Profile of a graph in an engine: where the time of one evaluation goes, by layer and by operation.

    step_ms        one evaluation as it is sampled with
    profiled_ms    the same in the profiler's instance of the graph
    layers_ms      sum of its layers; what is left of profiled_ms lies between them
    disturbed      whether other programs were running, by PREEMPTIONS and NOISE
    bound_ms       time of a layer at the machine's measured peaks (peaks.py)
    of_peak        bound_ms / ms

The two instances run in alternating blocks of a few evaluations. The time of an evaluation is the mean of its shortest
block, that of a layer the median over the blocks: other programs only add time, to most evaluations but to few of the
times of a single layer. Layers with one name (a repeated layer, kernels that an engine inserted) are one row per kind
of kernel.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.benchmarking.peaks import Peaks
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.engines import Engine
from diffpress.runtime.engines.executed_layers import OPERATIONS, ExecutedLayer

BLOCKS, RUNS = 6, 3  # per instance; one more run before each block is not measured, since the other instance ran last
NOISE, PREEMPTIONS = 0.15, 1.0  # from which a profile counts as disturbed
ENOUGH_SECONDS = 20.0  # after which no further block starts

Inputs = dict[str, np.ndarray]


class Times(NamedTuple):
    """What was measured: ms of an evaluation without and with the profiler, of the layers, and the noise.

    `noise` is how much longer the median block took than the shortest, as a ratio; `preemptions` is how often the
    system took a processor from this process per evaluation, None if it does not report that.
    """

    step_ms: float
    profiled_ms: float
    layers: tuple[tuple[ExecutedLayer, float], ...]
    noise: float
    preemptions: float | None

    @property
    def disturbed(self) -> bool:
        """Whether other programs were running."""
        return self.noise > NOISE or (self.preemptions is not None and self.preemptions >= PREEMPTIONS)


def profile_of(times: Times, peaks: Peaks) -> dict[str, Any]:
    """Return the profile of one evaluation: its times and the peaks, rows of operations, and rows of layers.

    {"step_ms", "profiled_ms", "layers_ms", "noise", "preemptions", "disturbed", "peaks", "operations", "layers"}; rows
    are sorted by time, longest first.
    """
    rows = _layer_rows(times.layers, peaks)
    return {
        "step_ms": times.step_ms,
        "profiled_ms": times.profiled_ms,
        "layers_ms": sum(row["ms"] for row in rows),
        "noise": times.noise,
        "preemptions": times.preemptions,
        "disturbed": times.disturbed,
        "peaks": peaks.to_json(),
        "operations": operation_rows(rows),
        "layers": rows,
    }


def measure(engine: Engine, inputs: Inputs) -> Times:
    """Return the times of one evaluation; raises EngineUnavailableError if the engine has no profiler here."""
    profiler = engine.profiler(inputs)
    instances: tuple[Callable[[], object], ...] = (lambda: engine.run(inputs), profiler.run)
    for work in instances:
        work()
    blocks = list[list[float]]()  # ms of an evaluation in each instance
    began, switches = time.perf_counter(), preemptions()
    while not blocks or (len(blocks) < BLOCKS and time.perf_counter() - began < ENOUGH_SECONDS):
        blocks.append([])
        for work in instances:
            work()
            (times,) = alternating_times_ms([work], RUNS)
            blocks[-1].append(sum(times) / RUNS)
    evaluations = 2 * len(blocks) * (RUNS + 1)
    taken = None if switches is None else (preemptions() or 0) - switches
    layers, totals = profiler.finish()
    ends = np.arange(1, len(blocks) + 1) * (RUNS + 1)  # of the blocks, in runs after the first
    ms = np.median((totals[ends] - totals[ends - RUNS]) / RUNS, axis=0)
    plain, profiled = np.array(blocks).T
    return Times(
        step_ms=float(plain.min()),
        profiled_ms=float(profiled.min()),
        layers=tuple(zip(layers, ms.tolist(), strict=True)),
        noise=float(np.median(profiled) / profiled.min() - 1.0),
        preemptions=None if taken is None else taken / evaluations,
    )


def preemptions() -> int | None:
    """Return how often the system took a processor from a thread of this process; None if it does not count that."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def _layer_rows(layers: Sequence[tuple[ExecutedLayer, float]], peaks: Peaks) -> list[dict[str, Any]]:
    merged: dict[tuple[str, str, str], dict[str, Any]] = {}
    for layer, ms in layers:
        row = merged.setdefault(
            (layer.name, layer.kernel, layer.precision),
            {
                **{key: getattr(layer, key) for key in ("name", "operation", "kernel", "precision")},
                **{"kernels": 0, "ms": 0.0, "macs": 0, "bytes": 0, "bound_ms": 0.0},
            },
        )
        row["kernels"] += 1
        row["ms"] += ms
        row["macs"] += layer.macs
        row["bytes"] += layer.bytes
        row["bound_ms"] += peaks.bound_ms(layer)
    rows = sorted(merged.values(), key=lambda row: -row["ms"])
    total = sum(row["ms"] for row in rows) or math.nan
    return [row | _rates(row, total) for row in rows]


def operation_rows(layers: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sum rows of layers by operation, longest first; `integer_ms` is the time of products of integers."""
    found = []
    total = sum(row["ms"] for row in layers) or math.nan
    for operation in OPERATIONS:
        own = [row for row in layers if row["operation"] == operation]
        if own:
            sums = {key: sum(row[key] for row in own) for key in ("kernels", "ms", "macs", "bytes", "bound_ms")}
            integer_ms = sum(row["ms"] for row in own if is_integer_product(row))
            found.append({"operation": operation, **sums, "integer_ms": integer_ms} | _rates(sums, total))
    return sorted(found, key=lambda row: -row["ms"])


def is_integer_product(row: dict[str, Any]) -> bool:
    """Return whether the row of a layer is that of a product of integers."""
    return bool(row["macs"]) and row["precision"] == "int8"


def _rates(row: dict[str, Any], total_ms: float) -> dict[str, Any]:
    """Return the figures that follow from a row's ms, MACs and bytes; a FLOP is a multiplication or an addition."""
    ms = row["ms"]
    return {
        "share": ms / total_ms,
        "flops": 2 * row["macs"],
        "intensity": 2 * row["macs"] / row["bytes"] if row["bytes"] else None,
        "gmacs": row["macs"] / ms / 1e6 if ms else None,
        "of_peak": row["bound_ms"] / ms if ms else None,
    }
