"""Cost and gain of quantizing or pruning a checkpoint in an engine: per layer from profiles, in total from timing.

    gain(layer) = its time in the float graph - its time in the quantized graph       medians over a few runs

A layer's time is that of the kernel that multiplies by its weight, including what the engine fused into it, plus its
own Q/DQ nodes where they run separately. Other kernels (norms, layout changes) belong to no layer. A quantized sum has
no kernel of its own: graphs with and without all quantized sums are timed, and each sum gets an equal share of the
difference. Gains are therefore good for ranking layers; bounds are checked with the time of the whole graph
(`latency_ratio`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import onnx

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import EngineCosts
from diffpress.compress.models.counts import is_large
from diffpress.compress.quantization.algorithms.sensitivity import quantized_layers
from diffpress.export.graph.model import Graph, save_graph
from diffpress.export.graph.to_onnx import to_onnx
from diffpress.export.lowering import PassContext, lower
from diffpress.export.passes.cut_graph import write_cached_graph
from diffpress.export.passes.quantize_weights import layer_of
from diffpress.export.verify.latency import BATCH, ENOUGH_MS, MAX_ROUNDS, ROUNDS, alternating_latency_ms
from diffpress.export.verify.reference import parity_case_for
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.engines import Engine, load_engine
from diffpress.runtime.engines.precision_report import Kernel
from diffpress.runtime.engines.split import SplitEngine
from diffpress.runtime.network_inputs import dummy_inputs

PROFILED_RUNS = 9
ACTIVATIONS = ("Clip", "HardSigmoid", "LeakyRelu", "Relu", "Sigmoid", "Tanh")  # that ONNX Runtime fuses
PROFILES = 3  # of each graph, in alternation
QUANTIZED, WITHOUT_SUMS, PRUNED = "quantized.onnx", "without_sums.onnx", "pruned.onnx"
CACHED = "float.cached.onnx"


@contextmanager
def open_engine_costs(checkpoint: Checkpoint, engine: str) -> Iterator[EngineCosts]:
    """Open the costs of quantizing or pruning the float `checkpoint` in `engine`.

    Raises:
        MissingDependencyError: If the engine is not installed.
    """
    graph = to_onnx(checkpoint.model, checkpoint.spec)
    case = parity_case_for(checkpoint.model, checkpoint.spec)
    with TemporaryDirectory() as folder:
        exact = Path(folder) / "float.onnx"
        save_graph(graph, exact)
        with closing(load_engine(exact, engine)) as opened:
            batch = 1 if is_large(checkpoint.model) else BATCH
            yield _Costs(graph, Path(folder), opened, dummy_inputs(opened, case.spec, batch))


class _Costs:
    """Implementation of diffpress.compress.context.EngineCosts."""

    def __init__(self, graph: Graph, folder: Path, exact: Engine, inputs: dict[str, np.ndarray]) -> None:
        self._graph, self._folder, self._exact, self._inputs = graph, folder, exact, inputs

    def gains_ms(self, quantization: Quantization) -> dict[str, float]:
        """Return layer -> milliseconds that quantizing it saves per evaluation."""
        quantized, _ = self._written(quantization)
        before = layer_times(self._exact.kernel_times(self._inputs, PROFILED_RUNS), self._graph)
        with self._opened() as rounded:
            after = layer_times(rounded.kernel_times(self._inputs, PROFILED_RUNS), quantized)
            sum_gains = self._gains_of_sums(quantization, rounded)
        return {layer: before.get(layer, 0.0) - after.get(layer, 0.0) for layer in quantization.layers} | sum_gains

    def _gains_of_sums(self, quantization: Quantization, rounded: Engine) -> dict[str, float]:
        """Return the measured gain of quantizing residual sums, divided equally among them."""
        sums = [layer for layer in quantized_layers(quantization) if layer not in quantization.layers]
        if not sums:
            return {}
        self._written(quantization.without(sums), WITHOUT_SUMS)
        with self._opened(WITHOUT_SUMS) as unrounded:
            with_ms, without_ms = alternating_latency_ms((rounded, unrounded), self._inputs)
        return dict.fromkeys(sums, (without_ms - with_ms) / len(sums))

    def latency_ratio(self, quantization: Quantization) -> float:
        """Return the time of the quantized graph divided by that of the float graph."""
        self._written(quantization)
        with self._opened() as rounded:
            exact_ms, rounded_ms = alternating_latency_ms((self._exact, rounded), self._inputs)
        return rounded_ms / exact_ms

    def relative_latency(self, pruned: Checkpoint) -> float:
        """Return the time of another float checkpoint's graph divided by that of this one's."""
        save_graph(to_onnx(pruned.model, pruned.spec), self._folder / PRUNED)
        with self._opened(PRUNED) as smaller:
            whole_ms, smaller_ms = alternating_latency_ms((self._exact, smaller), self._inputs)
        return smaller_ms / whole_ms

    def layer_times_ms(self, pruned: Checkpoint) -> tuple[dict[str, float], dict[str, float]]:
        """Return layer -> ms in the float graph and in that of another float checkpoint, profiled in alternation."""
        graph = to_onnx(pruned.model, pruned.spec)
        save_graph(graph, self._folder / PRUNED)
        with self._opened(PRUNED) as smaller:
            pairs = ((self._exact, self._graph), (smaller, graph))
            profiles = [
                [layer_times(engine.kernel_times(self._inputs, PROFILED_RUNS), own) for engine, own in pairs]
                for _ in range(PROFILES)
            ]
        before, after = (
            {layer: statistics.median(profile.get(layer, 0.0) for profile in found) for layer in found[0]}
            for found in zip(*profiles, strict=True)
        )
        return before, after

    def cached_latency_ratio(self) -> float:
        """Return the time of the cached graph divided by that of the whole graph with its features."""
        whole, features = self._folder / "float.onnx", [value.name for value in self._graph.proto.graph.output][1:]
        write_cached_graph(whole, self._folder / CACHED, features)
        with self._opened(CACHED) as cached:
            split = SplitEngine(self._exact, cached, tuple(features))
            _, held = split.run_full(self._inputs)
            works: list[Callable[[], object]] = [
                partial(split.run_full, self._inputs),
                partial(split.run_cached, self._inputs, held),
            ]
            works[1]()
            times = alternating_times_ms(works, ROUNDS, max_rounds=MAX_ROUNDS, enough_ms=ENOUGH_MS)
        full_ms, cached_ms = map(statistics.median, times)
        return cached_ms / full_ms

    def size_mib(self, quantization: Quantization) -> float:
        """Return the size of the quantized graph with its weights in MiB."""
        return self._written(quantization)[1] / 2**20

    @contextmanager
    def network(self, quantization: Quantization | None) -> Iterator[Engine]:
        """Open the quantized graph in the engine, or the float graph for None."""
        if quantization is None:
            yield self._exact
            return
        self._written(quantization)
        with self._opened() as rounded:
            yield rounded

    def _written(self, quantization: Quantization, file: str = QUANTIZED) -> tuple[Graph, int]:
        graph = lower(self._graph, "cpu", PassContext(quantization))
        return graph, save_graph(graph, self._folder / file)

    def _opened(self, file: str = QUANTIZED) -> AbstractContextManager[Engine]:
        return closing(load_engine(self._folder / file, self._exact.name))


def _owners(graph: onnx.GraphProto) -> dict[str, str]:
    """Return node or tensor name -> layer; engines name a kernel by node, output tensor or bias addition.

    ONNX Runtime names a convolution that it fused with an activation after the tensor that the activation writes.
    """
    stored = {tensor.name for tensor in graph.initializer}
    owners: dict[str, str] = {}
    layers_of_convolutions = {node.output[0]: layer_of(node) for node in graph.node if node.op_type == "Conv"}
    for node in graph.node:
        layer = layer_of(node)
        if node.op_type == "Add" and stored.intersection(node.input):
            layer = next((owners[name] for name in node.input if name in owners), "")
        if layer:
            owners |= dict.fromkeys((node.name, *node.output), layer)
        elif node.op_type in ACTIVATIONS and layers_of_convolutions.get(node.input[0]):
            owners[node.output[0]] = layers_of_convolutions[node.input[0]]
    return owners


def layer_times(kernels: Sequence[Kernel], graph: Graph) -> dict[str, float]:
    """Return layer -> milliseconds spent in the kernels of `graph` that belong to the layer."""
    owners = _owners(graph.proto.graph)
    found: dict[str, float] = {}
    for names, ms in kernels:
        layers = [owners[name] for name in names if name in owners]
        if not layers and len(names) == 1:  # a separate '<layer>.input/Q'; a fused one counts for the others
            layers = [owners[name] for name in (names[0].rpartition(".")[0],) if name in owners]
        for layer in layers[:1]:
            found[layer] = found.get(layer, 0.0) + ms
    return found
