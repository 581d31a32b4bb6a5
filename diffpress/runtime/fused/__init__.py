"""Fused sampling: an engine runs the whole sampling loop in one call.

This package imports the engines; they do not import it. `openvino` compiles the solver's step into the graph, `cuda`
runs it on the GPU between two evaluations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NoReturn, Protocol

import numpy as np

from diffpress.runtime.errors import EngineUnavailableError
from diffpress.runtime.fused import cuda, openvino
from diffpress.runtime.fused.program import Program, fused_program
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.spec import DenoiserSpec

RunFused = Callable[[Mapping[str, np.ndarray], np.ndarray], np.ndarray | None]


class FusedSampler(Protocol):
    """Runs all steps of a program in an engine."""

    def __call__(
        self, engine: Any, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray
    ) -> np.ndarray | None:
        """Run all steps of a program.

        Args:
            engine: The engine that the network is loaded in.
            program: Coefficients of the steps.
            static_inputs: Inputs besides sample and timestep, constant over all steps, [halves N, ...] each.
            start: Initial sample, float32 [N, C, ...].

        Returns:
            The final sample, float32 [N, C, ...], or None if this engine cannot run the program.
        """


# name of the engine -> its fused sampler
FUSED_SAMPLERS: dict[str, FusedSampler] = {"openvino": openvino.run_fused, "tensorrt": cuda.run_fused}


def run_fused_of(network: Network, spec: DenoiserSpec) -> RunFused | None:
    """Return the fused sampling of the spec's plan, (static inputs, initial sample) -> final sample.

    None if the network's engine has none, or if only the sampler's loop can run the plan.
    """
    sampler = FUSED_SAMPLERS.get(getattr(network, "name", ""))
    if sampler is None or (program := fused_program(spec)) is None:
        return None
    return partial(sampler, network, program)


def step_by_step(network: Network) -> Network:
    """Wrap a network so that the sampler's loop evaluates it step by step."""
    return SimpleNamespace(inputs=network.inputs, run=network.run)


def fused_only(network: Network) -> Network:
    """Wrap a network so that it raises EngineUnavailableError if the sampler falls back to single steps."""
    return _FusedOnly(network)


class _FusedOnly:
    def __init__(self, network: Network) -> None:
        self._network, self.inputs = network, network.inputs

    def __getattr__(self, name: str) -> Any:
        return getattr(self._network, name)

    def run(self, inputs: dict[str, np.ndarray]) -> NoReturn:
        raise EngineUnavailableError("this engine does not support fused sampling of this plan on this machine")
