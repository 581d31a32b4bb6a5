"""Engines run a bundle's graphs. A backend is one file with the same few names, and a line in ENGINES.

    EXTRA                       the extra of diffpress that brings its package (None: always there)
    OPTIONS                     the fields of EngineOptions that it knows; others are refused before it is asked
    missing() -> str | None     the package to install where that is absent, else None
    unusable() -> str | None    why this machine cannot run it although the package is there, in plain words, else None
    load(path, options, built) -> Engine
                                `path` is the ONNX graph, `built` are the files that the bundle holds for this engine
                                and graph, with their manifest entries. Raises Unfit for what this machine, library
                                version or graph does not allow, where another engine may do, and InvalidInputError for a file
                                that cannot be read or run, each in one line.

The backends import their package inside functions: listing them costs nothing. The sampler sees an `Engine` alone.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from diffpress.runtime.bundle import Built, Bundle
from diffpress.runtime.engines.onnxruntime import engine as onnxruntime_engine
from diffpress.runtime.engines.onnxruntime.providers import CPU
from diffpress.runtime.engines.openvino import engine as openvino_engine
from diffpress.runtime.engines.options import EngineOptions, check_options
from diffpress.runtime.engines.precision_report import Kernel, PrecisionReport
from diffpress.runtime.engines.tensorrt import engine as tensorrt_engine
from diffpress.runtime.errors import EngineUnavailableError, MissingDependencyError, unknown_name

# the preferred one first
ENGINES: dict[str, ModuleType] = {
    "tensorrt": tensorrt_engine,
    "openvino": openvino_engine,
    "onnxruntime": onnxruntime_engine,
}


class Engine(Protocol):
    """A loaded graph. It may be called from as many threads at once as its options have streams.

    One that can do the solver's steps where it computes also has `run_fused`, of diffpress.runtime.fused.program.Walker: it is handed
    the whole of a walk, where that is one of plain sums.
    """

    name: str
    device: str  # what it runs on: 'cpu', 'cuda', ...

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs by name, with the types they take."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The first output for one batch; the array is the caller's own."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, for graphs with several."""

    def precision_report(
        self, example_inputs: dict[str, np.ndarray], promised: Collection[str] = ()
    ) -> PrecisionReport:
        """Which convolutions and matrix products execute on integers, for inputs of these shapes.

        `promised` are the layers that should: a manifest's `quantized_layers`.
        """

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """Everything it executes for inputs of these shapes, and the median of `runs` runs, after one that warms up."""

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float | None:
        """The account's share of all multiply-accumulates that executes on integers; None where it has no account."""

    def close(self) -> None:
        """Release the engine's memory; it cannot run afterwards."""


def installed() -> list[str]:
    """The engines whose package is installed, the preferred one first."""
    return [name for name, backend in ENGINES.items() if backend.missing() is None]


def available() -> list[str]:
    """The engines that are installed and that this machine can run, the preferred one first."""
    return [name for name in installed() if ENGINES[name].unusable() is None]


def preferred() -> str:
    """The engine that is tried first where none is asked for."""
    return next(iter(available()), "onnxruntime")


def load_engine(
    path: str | Path,
    name: str | None = None,
    threads: int | None = None,
    *,
    options: EngineOptions | None = None,
    built: Sequence[Built] = (),
) -> Engine:
    """Load one graph file in the engine `name`; None takes the preferred one of those that can run here.

    `threads` goes before that of `options`. Raises InvalidInputError for an unknown name, for options that make no sense or
    that the engine does not have, and for an unreadable file; Unfit where the engine cannot run this here; and
    MissingDependencyError where its package is not installed.
    """
    name = preferred() if name is None else name
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    backend = ENGINES[name]
    options = (options or EngineOptions()).with_threads(threads)
    package = backend.missing()
    if package is not None:
        raise MissingDependencyError(package, backend.EXTRA, f"engine '{name}'")
    reason = backend.unusable()
    if reason is not None:
        raise EngineUnavailableError(f"engine '{name}' cannot run here: {reason}")
    check_options(name, options, backend.OPTIONS)
    engine: Engine = backend.load(Path(path), options, built)
    return engine


def open_engine(
    bundle: Bundle,
    name: str | None = None,
    threads: int | None = None,
    graph: str = "denoiser",
    *,
    options: EngineOptions | None = None,
) -> Engine:
    """Load a bundle's denoiser, or another of its graphs, in the form made for this engine; as `load_engine`.

    Where no engine is named and the preferred one does not fit, the next is taken, with a warning that says why.
    """
    names = [name] if name is not None else available() or [preferred()]
    options = options or EngineOptions()
    for candidate in names:
        path = bundle.graph(graph, candidate)
        # the bundle's hash covers every file of it
        cache = options.cache and options.cache.of(f"{bundle.hash} {path.relative_to(bundle.path).as_posix()}")
        try:
            return load_engine(
                path,
                candidate,
                threads,
                options=replace(options, cache=cache),
                built=bundle.built(graph, candidate),
            )
        except EngineUnavailableError as error:
            if candidate == names[-1]:
                raise
            warnings.warn(f"{error}; the next engine is tried", stacklevel=2)
    raise AssertionError("unreachable: there is at least one name")


def ran_in(engine: Engine) -> str:
    """The engine's name, and what it ran on where that is not the processor."""
    return engine.name if engine.device == CPU else f"{engine.name} ({engine.device})"
