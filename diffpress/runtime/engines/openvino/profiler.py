"""Profiler of an OpenVINO model: layers of the compiled model, timed by its performance counters.

A counter reports the average of all runs of its layer, in whole microseconds, so the time of the first n runs together
is n times the counter. A layer's operation follows from its type in the compiled model and from the operations of the
original model that it covers.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from diffpress.runtime.engines import executed_layers as kinds
from diffpress.runtime.engines.executed_layers import ExecutedLayer
from diffpress.runtime.engines.openvino.layers import (
    RESCALED,
    SUBGRAPH,
    is_integer,
    layer_info,
    node_name,
    operation_macs,
    original_names,
)
from diffpress.runtime.engines.precision_report import CALL

# layer types of the compiled model
TYPES = {
    **dict.fromkeys(("Convolution", "Deconvolution"), kinds.CONVOLUTION),
    "FullyConnected": kinds.LINEAR,
    **dict.fromkeys(("ScaledDotProductAttention", "MHA", "Softmax"), kinds.ATTENTION),
    **dict.fromkeys(("MVN", "GroupNormalization", "NormalizeL2", "RMS"), kinds.NORMALIZATION),
    **dict.fromkeys(("Reorder", "Convert", "FakeQuantize", "Transpose", "Reshape"), kinds.CONVERSION),
    **dict.fromkeys(("Eltwise", "Math"), kinds.ELEMENTWISE),
}
# operations of the original model, of which one decides what a subgraph is; the first that occurs
IN_SUBGRAPHS = {
    kinds.ATTENTION: {"MatMul", "Softmax", "ScaledDotProductAttention"},
    kinds.NORMALIZATION: {"MVN", "GroupNormalization", "NormalizeL2", "ReduceMean"},
}
ROUNDINGS = {"FakeQuantize", "Convert"}
MIXED = "mixed"


class OpenVinoProfiler:
    """See diffpress.runtime.engines.executed_layers.Profiler.

    Args:
        model: The original model, at the shapes of the inputs; it is read here only.
        compiled: The model compiled from it with PERF_COUNT.
        inputs: Inputs of one evaluation.
    """

    def __init__(self, model: Any, compiled: Any, inputs: dict[str, np.ndarray]) -> None:
        self._request, self._inputs = compiled.create_infer_request(), inputs
        self._layers = executed_layers(model, compiled)
        self._counters: list[dict[str, float]] = []  # of each run: layer -> average ms

    def run(self) -> None:
        """Evaluate the graph once."""
        self._request.infer(self._inputs, share_inputs=True, share_outputs=True)
        self._counters.append(
            {entry.node_name: entry.real_time.total_seconds() * 1e3 for entry in self._request.profiling_info}
        )

    def finish(self) -> tuple[list[ExecutedLayer], np.ndarray]:
        """Return the layers that took time or have products, and their times; see the protocol."""
        layers = {name: self._layers.get(name, _unknown(name)) for name in self._counters[-1]}
        names = [name for name, layer in layers.items() if self._counters[-1][name] > 0.0 or layer.macs]
        return [layers[name] for name in names], self._totals(names)

    def kernel_ms(self) -> dict[str, float]:
        """Return layer of the compiled model -> mean ms of all runs but the first."""
        names = list(self._counters[-1])
        totals = self._totals(names)
        return dict(zip(names, ((totals[-1] - totals[0]) / (len(totals) - 1)).tolist(), strict=True))

    def _totals(self, names: list[str]) -> np.ndarray:
        average = np.array([[found.get(name, 0.0) for name in names] for found in self._counters])
        runs = np.arange(1, len(average) + 1)[:, None]
        # an average is rounded down, so a total may fall by less than a microsecond per run
        totals: np.ndarray = np.maximum.accumulate(average * runs, axis=0)
        return totals


def executed_layers(model: Any, compiled: Any) -> dict[str, ExecutedLayer]:
    """Return the layers of a compiled model by their names in it."""
    operations = {operation.get_friendly_name(): operation for operation in model.get_ops()}
    products = {name: macs for name, operation in operations.items() if (macs := operation_macs(operation))}
    # if an operation is listed in two layers, its products are those of the integer one
    compiled_layers = sorted(compiled.get_runtime_model().get_ops(), key=is_integer, reverse=True)
    listed = [dict.fromkeys(n.removesuffix(RESCALED) for n in original_names(layer)) for layer in compiled_layers]
    fused = _fused_products([operations[name] for name in products], {name for names in listed for name in names})
    found = {}
    for layer, names in zip(compiled_layers, listed, strict=True):
        covered = [operations[name] for name in names if name in operations]
        multiplied = [name for name in (*names, *(fused[n] for n in names if n in fused)) if name in products]
        main = operations[multiplied[0]] if multiplied else next(iter(covered), None)
        name = str(layer.get_friendly_name())
        found[name] = ExecutedLayer(
            name=name if main is None else node_name(main).partition(CALL)[0],
            operation=_operation(layer, covered),
            kernel=layer_info(layer, "layerType"),
            precision=_precision(layer, bool(multiplied)),
            macs=sum(products.pop(name) for name in multiplied),
            bytes=_bytes(layer),
        )
    return found


def _fused_products(products: list[Any], listed: set[str]) -> dict[str, str]:
    """Return listed operation -> product that no layer lists: that operation, such as a bias, is the next behind it."""
    found = {}
    for product in products:
        name, behind = str(product.get_friendly_name()), product
        while behind is not None and behind.get_friendly_name() not in listed:
            behind = next((target.get_node() for target in behind.output(0).get_target_inputs()), None)
            if behind is not None and not behind.get_output_size():
                behind = None
        if behind is not None and behind is not product:
            found[str(behind.get_friendly_name())] = name
    return found


def _unknown(name: str) -> ExecutedLayer:
    return ExecutedLayer(name, kinds.OTHER, "", "", 0, 0)


def _precision(layer: Any, multiplies: bool) -> str:
    """Return what a layer computes in; for products inside a subgraph that reads integers that is not reported."""
    name = layer_info(layer, "runtimePrecision")
    precision = kinds.PRECISIONS.get(name, name)
    return MIXED if multiplies and precision == kinds.INT8 and not is_integer(layer) else precision


def _operation(layer: Any, covered: list[Any]) -> str:
    kind, covers = layer_info(layer, "layerType"), {operation.get_type_name() for operation in covered}
    if kind == "MatMul":
        return kinds.ATTENTION if any(map(_multiplies_activations, covered)) else kinds.LINEAR
    if kind == SUBGRAPH:
        deciding = (operation for operation, names in IN_SUBGRAPHS.items() if covers & names)
        rounds_only = bool(covers) and covers <= ROUNDINGS
        return next(deciding, kinds.CONVERSION if rounds_only else kinds.ELEMENTWISE)
    return TYPES.get(kind, kinds.OTHER)


def _multiplies_activations(operation: Any) -> bool:
    return operation.get_type_name() == "MatMul" and not any(map(_is_stored, operation.input_values()))


def _is_stored(value: Any) -> bool:
    """Return whether a value depends on constants only."""
    pending, seen = [value.get_node()], set[str]()
    while pending:
        node = pending.pop()
        if node.get_type_name() == "Parameter":
            return False
        if node.get_name() not in seen:
            seen.add(node.get_name())
            pending += [source.get_node() for source in node.input_values()]
    return True


def _bytes(layer: Any) -> int:
    """Return the bytes of a layer's inputs, weights included, and outputs."""
    ports = [*layer.inputs(), *layer.outputs()]
    return sum(math.prod(port.get_shape()) * port.get_element_type().size for port in ports)
