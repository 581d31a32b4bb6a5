"""Fused sampling in OpenVINO: the solver step is part of the compiled graph, and its arrays stay in place.

    x -> network -> guidance, x_0 from the output, clipping, the solver's weighted sums -> next x

One inference is one step of a Program (diffpress.runtime.fused.program); the program's row for that step is an input,
so one graph runs all programs. x and the MAX_HISTORY previous (kept, x_0) pairs are stored in ring buffers of
MAX_HISTORY + 1 slots. There is one inference request per slot, bound so that its outputs are the inputs of the next.

A step whose output is a forecast (caching/forecast.py) runs no inference: numpy computes it in the same slots, from
outputs that a second form of the graph also returns.

A numpy solver step takes 20 us by itself, but 155 us between two network evaluations, since the CPU caches are cold; as
part of the graph it is a few small kernels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np

from diffpress.runtime.caching.forecast import weighted_outputs
from diffpress.runtime.engines.openvino.engine import OpenVinoEngine, Variant
from diffpress.runtime.fused.program import COLUMNS, TERMS, Program
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP, typed_timesteps
from diffpress.runtime.solvers.contract import MAX_HISTORY

FORM = 3  # version of the fused graph, part of the cache key: increment it with every change of the graph
SLOTS = MAX_HISTORY + 1
# above it, fused sampling saves little per step, while its compiled model doubles the memory
MAX_GRAPH_BYTES = 2**26

# added inputs and outputs of the graph; the dot avoids collisions with the network's names
X, WEIGHTS, OFFSETS, BOUNDS = "fused.x", "fused.weights", "fused.offsets", "fused.bounds"
HISTORY_KEPT, HISTORY_X0 = (tuple(f"fused.{what}.{back + 1}" for back in range(MAX_HISTORY)) for what in ("kept", "x0"))
NEXT, KEPT, X0, OUT = "fused.next", "fused.kept", "fused.x0", "fused.out"
BATCH_AXIS = 0


def run_fused(
    engine: OpenVinoEngine, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray
) -> np.ndarray | None:
    """Run all steps of a program inside OpenVINO; see diffpress.runtime.fused.FusedSampler.

    Returns None for large networks, for other sample types than float32, and for fp16, for which it is untested
    whether the solver steps stay in float32.
    """
    if engine.precision == "fp16" or engine.inputs[SAMPLE] != np.float32 or engine.graph_bytes > MAX_GRAPH_BYTES:
        return None
    rows, halves = program.halves * len(start), program.halves
    static_inputs = {**static_inputs, **engine.lora}
    shapes = {name: array.shape for name, array in static_inputs.items()}
    shapes |= {SAMPLE: (rows, *start.shape[1:]), TIMESTEP: (rows,)}
    returns_out = not program.evaluates_all
    change = partial(fused_model, halves=halves, returns_out=returns_out)
    variant = Variant((FORM, halves, int(returns_out)), change, FusedSampling)
    with engine.reserved(tuple(shapes.items()), variant) as sampling:
        return sampling.run(program, static_inputs, start)


def fused_model(model: Any, halves: int, returns_out: bool = False) -> Any:
    """Return a copy of a network that is wrapped in one solver step.

    Instead of `sample` the new model has these inputs: x, float32 [N, C, ...]; kept and x_0 of the previous steps, of
    the same shape; a row of Program.table and one of Program.offsets; and the guidance weight with the lower and upper
    bound of x_0, [3]. It returns the next x, kept and x_0. All three are model outputs, which OpenVINO computes in
    float32 even if the network runs in bfloat16.

    Args:
        model: openvino.Model with fixed shapes and float32 samples.
        halves: 2 under guidance, else 1.
        returns_out: Also return the network's output, after guidance.
    """
    import openvino
    from openvino import opset13 as op

    model = model.clone()
    nodes = model.get_parameters()
    (sample,) = [node for node in nodes if SAMPLE in node.output(0).get_names()]
    rows, channels, *sides = sample.output(0).get_shape()
    shape = (rows // halves, channels, *sides)
    parameters = [node for node in nodes if node is not sample]

    def parameter(name: str, *shape: int) -> Any:
        parameters.append(op.parameter(list(shape), np.float32, name=name))
        parameters[-1].output(0).set_names({name})
        return parameters[-1]

    def result(name: str, node: Any) -> Any:
        node.output(0).set_names({name})
        return op.result(node)

    def weighted(terms: list[Any], weights: list[Any]) -> Any:
        total, *others = map(op.multiply, terms, weights)
        for other in others:
            total = op.add(total, other)
        return total

    x, axis = parameter(X, *shape), op.constant(np.int64(BATCH_AXIS))
    history = [parameter(name, *shape) for pair in zip(HISTORY_KEPT, HISTORY_X0, strict=True) for name in pair]
    a, b, *sums = op.split(parameter(WEIGHTS, COLUMNS), axis, COLUMNS).outputs()
    offset = op.reshape(parameter(OFFSETS, channels), np.array([1, channels, *[1] * len(sides)]), False)
    weight, low, high = op.split(parameter(BOUNDS, 3), axis, 3).outputs()

    sample.output(0).replace(op.concat([x] * halves, BATCH_AXIS).output(0))
    out = model.get_results()[0].input_value(0)
    if halves == 2:
        cond, uncond = op.split(out, axis, 2).outputs()
        out = op.add(uncond, op.multiply(weight, op.subtract(cond, uncond)))
    x0 = op.minimum(op.maximum(op.add(weighted([x, out], [a, b]), offset), low), high)
    terms = [x, x0, op.clamp(x0, -1.0, 1.0), *history]
    kept, moved = weighted(terms, sums[:TERMS]), weighted(terms, sums[TERMS:])
    results = [result(NEXT, moved), result(KEPT, kept), result(X0, x0)]
    if returns_out:
        results.append(result(OUT, op.multiply(out, np.float32(1.0))))  # the network may name its output itself
    return openvino.Model(results, parameters, "fused")


class FusedSampling:
    """Inference requests of a compiled fused model, and the arrays they read and write."""

    def __init__(self, compiled: Any) -> None:
        import openvino

        def shared(array: np.ndarray) -> Any:
            return openvino.Tensor(array, shared_memory=True)

        shape = tuple(compiled.input(X).shape)
        self._x, self._past = np.zeros((SLOTS, *shape), np.float32), np.zeros((2, SLOTS, *shape), np.float32)
        x, kept, x0 = ([shared(slot) for slot in ring] for ring in (self._x, *self._past))
        rings = {X, *HISTORY_KEPT, *HISTORY_X0}
        fixed_ports = [port for port in compiled.inputs if not rings & port.names]
        arrays = [np.zeros(tuple(port.shape), port.element_type.to_dtype()) for port in fixed_ports]
        self._arrays = {name: array for port, array in zip(fixed_ports, arrays, strict=True) for name in port.names}
        tensors = [shared(array) for array in arrays]
        self._out = np.zeros(shape, np.float32)
        self._returns_out = any(OUT in port.names for port in compiled.outputs)
        self._requests = [compiled.create_infer_request() for _ in range(SLOTS)]
        for slot, request in enumerate(self._requests):
            for port, tensor in zip(fixed_ports, tensors, strict=True):
                request.set_tensor(port, tensor)
            bound = {X: x[slot], KEPT: kept[slot], X0: x0[slot], NEXT: x[(slot + 1) % SLOTS]}
            for back, names in enumerate(zip(HISTORY_KEPT, HISTORY_X0, strict=True), 1):
                bound |= dict(zip(names, (kept[slot - back], x0[slot - back]), strict=True))
            if self._returns_out:
                bound[OUT] = shared(self._out)
            for name, tensor in bound.items():
                request.set_tensor(name, tensor)

    def run(self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        """Run all steps of a program; see diffpress.runtime.fused.FusedSampler."""
        low, high = program.bounds or (-math.inf, math.inf)
        for name, array in {**static_inputs, BOUNDS: np.array([program.guidance, low, high])}.items():
            self._arrays[name][...] = array
        self._x[0], self._past[...] = start, 0.0
        timestep, weights, offsets = (self._arrays[name] for name in (TIMESTEP, WEIGHTS, OFFSETS))
        outputs: dict[int, np.ndarray] = {}
        for index, time in enumerate(typed_timesteps(program.timesteps, timestep.dtype)):
            if program.forecasts[index]:
                self._forecast(program, index, outputs)
                continue
            timestep[...], weights[...], offsets[...] = time, program.table[index], program.offsets[index]
            self._requests[index % SLOTS].infer(share_outputs=True)
            if self._returns_out:
                outputs[index] = self._out.copy()
        last: np.ndarray = self._x[program.steps % SLOTS].copy()  # the next run overwrites it
        return last

    def _forecast(self, program: Program, index: int, outputs: Mapping[int, np.ndarray]) -> None:
        """Compute the step `index` from the outputs of earlier steps, into the slots that an inference would fill."""
        sources, forecast = zip(*program.forecasts[index], strict=True)
        x, (kept, x0) = self._x[index % SLOTS], self._past[:, index % SLOTS]
        (a, b), low_high = program.reads[index], program.bounds or (-math.inf, math.inf)
        offset = program.offsets[index].reshape(-1, *[1] * (x.ndim - 2))
        np.clip(a * x + b * weighted_outputs([outputs[k] for k in sources], forecast) + offset, *low_high, out=x0)
        history = [self._past[which, (index - back) % SLOTS] for back in range(1, MAX_HISTORY + 1) for which in (0, 1)]
        terms = [x, x0, np.clip(x0, -1.0, 1.0), *history]
        for target, row in ((kept, program.kept[index]), (self._x[(index + 1) % SLOTS], program.moved[index])):
            used = np.flatnonzero(row)
            target[...] = weighted_outputs([terms[k] for k in used], row[used])
