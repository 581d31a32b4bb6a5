"""A walk inside OpenVINO: the solver's step is part of the compiled graph, which remembers samples from call to call.

    sample (remembered) -> network -> guidance, x_0 read off the output, bounds, the sums that are the solver -> sample

One call is one step as a Program says (runtime.linear_walk), whose row for that step is an input, so one graph walks
all programs. Past steps move up by one from call to call. Between two calls of a network the caches are cold, and
what takes numpy 20 us by itself takes 155 there; here it is a few small kernels at the end of a graph.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from runtime.denoise import SAMPLE, TIMESTEP, told_timesteps
from runtime.linear_walk import COLUMNS, TERMS, Program
from runtime.solvers.contract import MEMORY

FORM = 1  # of a walking model, to be counted up with every change of it: compiled ones are kept from run to run

# inputs of the graph besides the network's own; the dot keeps them apart from those
START, WEIGHTS, OFFSETS, BOUNDS = "walk.start", "walk.weights", "walk.offsets", "walk.bounds"
MOVED = "walk.moved"  # its output
BATCH_AXIS = 0


def walking_model(model: Any, halves: int) -> Any:
    """The network `model` (openvino.Model of fixed shapes, float32 samples; taken apart here) with the step around it.

    In the place of `sample` it takes the sample to start from, float32 [N, C, H, W], which counts in the first call
    after a reset; a row of Program's table and one of its offsets; and guidance's weight with the lower and the upper
    bound of x_0, [3]. It returns the sample after the step.
    """
    import openvino
    from openvino import opset13 as op

    (given,) = [node for node in model.get_parameters() if SAMPLE in node.output(0).get_names()]
    rows, channels, *sides = given.output(0).get_shape()
    shape = [rows // halves, channels, *sides]

    def parameter(name: str, *shape: int) -> Any:
        node = op.parameter(list(shape), np.float32, name=name)
        node.output(0).set_names({name})
        return node

    def remembered(name: str, first: Any) -> tuple[Any, Any]:
        info = openvino.op.util.VariableInfo()
        info.variable_id, info.data_type = name, openvino.Type.f32
        info.data_shape = openvino.PartialShape(shape)
        variable = openvino.op.util.Variable(info)
        return op.read_value(first, variable), variable

    def weighted(terms: list[Any], weights: list[Any]) -> Any:
        first, *others = map(op.multiply, terms, weights)
        for other in others:
            first = op.add(first, other)
        return first

    start, weights = parameter(START, *shape), parameter(WEIGHTS, COLUMNS)
    offsets, bounds = parameter(OFFSETS, channels), parameter(BOUNDS, 3)
    axis = op.constant(np.int64(BATCH_AXIS))
    a, b, *sums = op.split(weights, axis, COLUMNS).outputs()
    weight, low, high = op.split(bounds, axis, 3).outputs()

    x, x_variable = remembered("walk.x", start)
    nothing = op.constant(np.zeros(shape, np.float32))
    past = [remembered(f"walk.past.{number}", nothing) for number in range(2 * MEMORY)]

    given.output(0).replace(op.concat([x] * halves, BATCH_AXIS).output(0))
    out = model.get_results()[0].input_value(0)
    if halves == 2:
        label, null = op.split(out, axis, 2).outputs()
        out = op.add(null, op.multiply(weight, op.subtract(label, null)))
    offset = op.reshape(offsets, np.array([1, channels, *[1] * len(sides)]), False)
    guess = op.add(weighted([x, out], [a, b]), offset)
    guess = op.minimum(op.maximum(guess, low), high)
    terms = [x, guess, op.clamp(guess, -1.0, 1.0), *(node for node, _ in past)]
    kept, moved = weighted(terms, sums[:TERMS]), weighted(terms, sums[TERMS:])

    # kept and x_0 of this step become the latest pair, and each pair the one before it
    moving_up = [kept, guess, *(node for node, _ in past)]
    remember = [op.assign(node, variable) for node, (_, variable) in zip(moving_up, past, strict=False)]
    told = [node for node in model.get_parameters() if node.get_friendly_name() != given.get_friendly_name()]
    remember.append(op.assign(moved, x_variable))
    moved.output(0).set_names({MOVED})
    return openvino.Model([op.result(moved)], remember, [*told, start, weights, offsets, bounds], "walk")


class Walk:
    """A request of a compiled walking model, and the arrays that it reads its inputs from."""

    def __init__(self, compiled: Any) -> None:
        import openvino

        self._request, self._arrays = compiled.create_infer_request(), dict[str, np.ndarray]()
        for port in (*compiled.inputs, compiled.output(0)):
            array = np.zeros(tuple(port.shape), port.element_type.to_dtype())
            self._request.set_tensor(port, openvino.Tensor(array, shared_memory=True))
            self._arrays |= dict.fromkeys(port.names, array)

    def run(self, program: Program, told: Mapping[str, np.ndarray], start: np.ndarray) -> np.ndarray:
        """As runtime.linear_walk.Walker."""
        low, high = program.bounds or (-math.inf, math.inf)
        for name, array in {**told, START: start, BOUNDS: np.array([program.guidance, low, high])}.items():
            self._arrays[name][...] = array
        timestep, weights, offsets = (self._arrays[name] for name in (TIMESTEP, WEIGHTS, OFFSETS))
        times = told_timesteps(program.timesteps, timestep.dtype)
        self._request.reset_state()
        for timestep[...], weights[...], offsets[...] in zip(times, program.table, program.offsets, strict=True):
            self._request.infer(share_outputs=True)
        return self._arrays[MOVED].copy()  # the next walk writes over it
