"""A walk inside OpenVINO: the solver's step is part of the compiled graph, and its arrays stay where they are.

    x -> network -> guidance, x_0 read off the output, bounds, the sums that are the solver -> next x

One call is one step as a Program says (diffpress.runtime.fused.program), whose row for that step is an input, so one graph walks
all programs. What a call returns is where later calls look for it: x, and the pairs of MAX_HISTORY past steps, lie in rings
of MAX_HISTORY + 1 places, and as many requests are bound to them, each one place further. Between two calls of a network the
caches are cold, and what takes numpy 20 us by itself takes 155 there; here it is a few small kernels in the graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import cycle
from typing import Any

import numpy as np

from diffpress.runtime.fused.program import COLUMNS, TERMS, Program
from diffpress.runtime.network_inputs import SAMPLE, TIMESTEP, typed_timesteps
from diffpress.runtime.solvers.contract import MAX_HISTORY

FORM = 1  # of a walking model, to be counted up with every change of it: compiled ones are kept from run to run
PLACES = MAX_HISTORY + 1

# inputs of the graph besides the network's own, and its outputs; the dot keeps them apart from those
X, WEIGHTS, OFFSETS, BOUNDS = "walk.x", "walk.weights", "walk.offsets", "walk.bounds"
HISTORY_KEPT, HISTORY_X0 = (tuple(f"walk.{what}.{back + 1}" for back in range(MAX_HISTORY)) for what in ("kept", "x0"))
NEXT, KEPT, X0 = "walk.next", "walk.kept", "walk.x0"
BATCH_AXIS = 0


def fused_model(model: Any, halves: int) -> Any:
    """The network `model` (openvino.Model of fixed shapes, float32 samples; taken apart here) with the step around it.

    In the place of `sample` it takes x, float32 [N, C, H, W]; kept and x_0 of the steps before, shaped like it; a row
    of Program's table and one of its offsets; and guidance's weight with the lower and the upper bound of x_0, [3]. It
    returns the next x, kept and x_0. All of them are outputs, which OpenVINO computes in float32 even where the network
    is to be in bfloat16.
    """
    import openvino
    from openvino import opset13 as op

    nodes = model.get_parameters()
    (given,) = [node for node in nodes if SAMPLE in node.output(0).get_names()]
    rows, channels, *sides = given.output(0).get_shape()
    shape = (rows // halves, channels, *sides)
    taken = [node for node in nodes if node is not given]

    def parameter(name: str, *shape: int) -> Any:
        taken.append(op.parameter(list(shape), np.float32, name=name))
        taken[-1].output(0).set_names({name})
        return taken[-1]

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

    given.output(0).replace(op.concat([x] * halves, BATCH_AXIS).output(0))
    out = model.get_results()[0].input_value(0)
    if halves == 2:
        label, null = op.split(out, axis, 2).outputs()
        out = op.add(null, op.multiply(weight, op.subtract(label, null)))
    x0 = op.minimum(op.maximum(op.add(weighted([x, out], [a, b]), offset), low), high)
    terms = [x, x0, op.clamp(x0, -1.0, 1.0), *history]
    kept, moved = weighted(terms, sums[:TERMS]), weighted(terms, sums[TERMS:])
    return openvino.Model([result(NEXT, moved), result(KEPT, kept), result(X0, x0)], taken, "walk")


class FusedSampling:
    """The requests of a compiled walking model, and the arrays that they read and write."""

    def __init__(self, compiled: Any) -> None:
        import openvino

        def shared(array: np.ndarray) -> Any:
            return openvino.Tensor(array, shared_memory=True)

        shape = tuple(compiled.input(X).shape)
        self._x, self._past = np.zeros((PLACES, *shape), np.float32), np.zeros((2, PLACES, *shape), np.float32)
        x, kept, x0 = ([shared(place) for place in ring] for ring in (self._x, *self._past))
        rings = {X, *HISTORY_KEPT, *HISTORY_X0}
        fixed_ports = [port for port in compiled.inputs if not rings & port.names]
        arrays = [np.zeros(tuple(port.shape), port.element_type.to_dtype()) for port in fixed_ports]
        self._arrays = {name: array for port, array in zip(fixed_ports, arrays, strict=True) for name in port.names}
        tensors = [shared(array) for array in arrays]
        self._requests = [compiled.create_infer_request() for _ in range(PLACES)]
        for place, request in enumerate(self._requests):
            for port, tensor in zip(fixed_ports, tensors, strict=True):
                request.set_tensor(port, tensor)
            bound = {X: x[place], KEPT: kept[place], X0: x0[place], NEXT: x[(place + 1) % PLACES]}
            for back, names in enumerate(zip(HISTORY_KEPT, HISTORY_X0, strict=True), 1):
                bound |= dict(zip(names, (kept[place - back], x0[place - back]), strict=True))
            for name, tensor in bound.items():
                request.set_tensor(name, tensor)

    def run(self, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        """As diffpress.runtime.fused.program.Walker."""
        low, high = program.bounds or (-math.inf, math.inf)
        for name, array in {**static_inputs, BOUNDS: np.array([program.guidance, low, high])}.items():
            self._arrays[name][...] = array
        self._x[0], self._past[...] = start, 0.0
        timestep, weights, offsets = (self._arrays[name] for name in (TIMESTEP, WEIGHTS, OFFSETS))
        rows = zip(typed_timesteps(program.timesteps, timestep.dtype), program.table, program.offsets, strict=True)
        for request, (timestep[...], weights[...], offsets[...]) in zip(cycle(self._requests), rows, strict=False):
            request.infer(share_outputs=True)
        last: np.ndarray = self._x[program.steps % PLACES].copy()  # the next walk writes over it
        return last
