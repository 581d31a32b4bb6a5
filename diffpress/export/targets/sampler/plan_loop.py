"""A sampling plan as an ONNX Loop: one iteration is one step of a Program (diffpress.runtime.fused.program).

    row i of the tables -> timestep, coefficients
    x -> denoiser -> guidance -> x_0 -> clip -> the solver's weighted sums -> next x

The coefficients of all steps are tables, so the graph has the same size for any number of steps. The Loop carries x,
kept and x_0 of as many earlier steps as the solver reads, and the outputs that forecasts are made of.

A step whose output is a forecast (caching/forecast.py) takes the other branch of an If, without the denoiser.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from onnx import helper

from diffpress.export.targets.sampler.block import BATCH, Block, value_info
from diffpress.export.targets.sampler.evaluation import Denoiser
from diffpress.runtime.fused.program import CLIPPED_TERM, FIRST_HISTORY, SAMPLE_TERM, X0_TERM, Program
from diffpress.runtime.network_inputs import typed_timesteps

INDEX, GOES_ON, CONTINUES = "step/index", "step/goes_on", "step/continues"


def add_loop(main: Block, denoiser: Denoiser, program: Program, start: str, sample_shape: Sequence[int]) -> str:
    """Add the Loop over all steps of a program; returns the final sample, float32 [N, C, ...].

    Args:
        main: The main block.
        denoiser: The denoiser.
        program: Coefficients of the steps.
        start: The initial sample, float32 [N, C, ...].
        sample_shape: Shape of one sample.
    """
    body = main.inner()
    shape: list[int | str] = [BATCH, *sample_shape]
    history = [f"step/{name}_{back + 1}" for back in range(_depth(program)) for name in ("kept", "x0")]
    outputs = [f"step/out_{back + 1}" for back in range(max(map(len, program.forecasts)))]
    carried = ["step/x", *history, *outputs]
    step = _Step(body, program, carried[0], history)
    out, next_outputs = _add_output(step, denoiser, outputs)
    ends = [body.op("Identity", tensor) for tensor in (*step.solve(out, len(sample_shape)), *next_outputs)]
    body.nodes.append(helper.make_node("Identity", [GOES_ON], [CONTINUES], name=CONTINUES))
    subgraph = body.subgraph(
        "step",
        [
            value_info(INDEX, np.int64, ()),
            value_info(GOES_ON, bool, ()),
            *(value_info(name, np.float32, shape) for name in carried),
        ],
        [value_info(CONTINUES, bool, ()), *(value_info(name, np.float32, shape) for name in ends)],
    )
    steps, goes_on = main.constant(program.steps, np.int64), main.constant(True, bool)
    zeros = main.op("Mul", start, main.constant(0.0)) if len(carried) > 1 else ""
    given = [start, *[zeros] * (len(carried) - 1)]
    return main.split_op("Loop", steps, goes_on, *given, outputs=len(carried), body=subgraph)[0]


@dataclass(frozen=True)
class _Step:
    """The Loop's body, and names of what it carries: x, then kept and x_0 of each earlier step, the latest first."""

    body: Block
    program: Program
    x: str
    history: Sequence[str]

    def row(self, table: np.ndarray, dtype: type | np.dtype = np.float32) -> str:
        """Return this step's row of a table [steps, ...]."""
        return self.body.op("Gather", self.body.constant(table, dtype), INDEX, axis=0)

    def weights(self, table: np.ndarray) -> list[str]:
        """Return this step's row of a table [steps, n] as n tensors [1]."""
        row, count = self.row(table), table.shape[1]
        return [row] if count == 1 else self.body.split_op("Split", row, outputs=count, axis=0, num_outputs=count)

    def solve(self, out: str, rank: int) -> list[str]:
        """Return x and the history after the step; `out` is the denoiser's output, `rank` that of one sample."""
        body, program = self.body, self.program
        a, b = self.weights(program.reads)
        x0 = body.op("Add", body.op("Mul", self.x, a), body.op("Mul", out, b))
        if program.offsets.any():
            x0 = body.op("Add", x0, self.row(program.offsets.reshape(*program.offsets.shape, *[1] * (rank - 1))))
        if program.bounds is not None:
            x0 = body.op("Clip", x0, *(body.constant(bound) for bound in program.bounds))
        terms = {SAMPLE_TERM: self.x, X0_TERM: x0, **dict(enumerate(self.history, FIRST_HISTORY))}
        if (program.moved[:, CLIPPED_TERM].any()) or program.kept[:, CLIPPED_TERM].any():
            terms[CLIPPED_TERM] = body.op("Clip", x0, body.constant(-1.0), body.constant(1.0))
        moved = self.weighted(terms, program.moved)
        if not self.history:
            return [moved]
        return [moved, self.weighted(terms, program.kept), x0, *self.history[:-2]]

    def weighted(self, terms: Mapping[int, str], table: np.ndarray) -> str:
        """Return the sum of the terms with this step's weights; terms without a weight in any step are left out."""
        used = np.flatnonzero(table.any(axis=0))
        if used.tolist() == [SAMPLE_TERM] and (table[:, SAMPLE_TERM] == 1.0).all():
            return self.x  # a solver without a corrector keeps the sample
        return self.sum([terms[int(k)] for k in used], self.weights(table[:, used]))

    def sum(self, tensors: Sequence[str], weights: Sequence[str]) -> str:
        """Return the weighted sum of tensors; the weights are tensors [1]."""
        total, *others = map(self.body.op, ["Mul"] * len(tensors), tensors, weights)
        for other in others:
            total = self.body.op("Add", total, other)
        return total


def _add_output(step: _Step, denoiser: Denoiser, held: Sequence[str]) -> tuple[str, list[str]]:
    """Add the step's output, and the outputs that are held after it; `held` are those before it, the latest first."""
    body, program = step.body, step.program
    timestep = step.row(typed_timesteps(program.timesteps, denoiser.timestep_dtype), denoiser.timestep_dtype)
    if not held:
        return denoiser.evaluate(body, step.x, timestep), []
    forecast = step.sum(held, step.weights(_forecast_table(program, len(held))))
    evaluates = step.row(np.array([not sources for sources in program.forecasts]), bool)
    out = body.op(
        "If",
        evaluates,
        then_branch=_branch(body, "evaluate", lambda block: denoiser.evaluate(block, step.x, timestep)),
        else_branch=_branch(body, "forecast", lambda block: block.op("Identity", forecast)),
    )
    return out, [body.op("Where", evaluates, new, old) for new, old in zip([out, *held], held, strict=False)]


def _branch(body: Block, name: str, add: Callable[[Block], str]) -> object:
    block = body.inner()
    out = add(block)
    return block.subgraph(name, [], [value_info(out, np.float32, None)])


def _forecast_table(program: Program, count: int) -> np.ndarray:
    """Return the weight of each of the last `count` outputs in each step, the latest first, float32 [steps, count]."""
    table, evaluated = np.zeros((program.steps, count), np.float32), list[int]()
    for index, forecast in enumerate(program.forecasts):
        for source, weight in forecast:
            table[index, evaluated[::-1].index(source)] = weight
        if not forecast:
            evaluated.append(index)
    return table


def _depth(program: Program) -> int:
    """Return the number of earlier steps that any step reads."""
    used = np.flatnonzero(program.moved.any(axis=0) | program.kept.any(axis=0))
    return max(0, (int(used.max()) - FIRST_HISTORY) // 2 + 1)
