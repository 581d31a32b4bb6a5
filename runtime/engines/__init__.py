"""Engines run a bundle's graphs. A backend is one file with the same few functions, and a line in ENGINES.

    EXTRA                                   the extra of diffpress that brings the package (None: always)
    missing() -> str | None                 the package to install where it is absent, else None
    load(path, *, threads=None) -> Engine   raises BadInput for a file that the backend cannot read

The backends import their package inside functions: listing them costs nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from runtime.bundle import Bundle
from runtime.engines import onnxruntime_engine, openvino_engine
from runtime.engines.account import Account, Kernel
from runtime.errors import BadInput, MissingExtra, unknown_name

ENGINES: dict[str, ModuleType] = {
    "openvino": openvino_engine,
    "onnxruntime": onnxruntime_engine,
}


class Engine(Protocol):
    """A loaded graph with one output."""

    name: str

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """The graph's inputs by name, with the types they take."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """The first output for one batch; the array is the caller's own."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Every output by name, for graphs with several."""

    def account(self, example_inputs: dict[str, np.ndarray], promised: Collection[str] = ()) -> Account:
        """Which convolutions and matrix products execute on integers, for inputs of these shapes.

        `promised` are the layers that should: a manifest's `quantized_layers`.
        """

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """Everything it executes for inputs of these shapes, and the median of `runs` runs, after one that warms up."""

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float:
        """The account's share of all multiply-accumulates that executes on integers."""

    def close(self) -> None:
        """Release the engine's memory; it cannot run afterwards."""


def available() -> list[str]:
    """The engines whose package is installed, the preferred one first."""
    return [name for name, backend in ENGINES.items() if backend.missing() is None]


def preferred() -> str:
    """The engine that is taken where none is asked for."""
    return next(iter(available()), "onnxruntime")


def load_engine(path: str | Path, name: str | None = None, threads: int | None = None) -> Engine:
    """Load one graph file in the engine `name`; None takes openvino where it is installed, else onnxruntime.

    `threads` None leaves the number to the engine. Raises BadInput for an unknown name, a bad number of
    threads or an unreadable file, and MissingExtra where the package is not installed.
    """
    if threads is not None and threads < 1:
        raise BadInput(f"{threads} threads: at least 1, or leave it out to let the engine choose")
    name = preferred() if name is None else name
    if name not in ENGINES:
        raise unknown_name("engine", name, ENGINES)
    backend = ENGINES[name]
    package = backend.missing()
    if package is not None:
        raise MissingExtra(package, backend.EXTRA, f"engine '{name}'")
    engine: Engine = backend.load(Path(path), threads=threads)
    return engine


def open_engine(
    bundle: Bundle, name: str | None = None, threads: int | None = None, graph: str = "denoiser"
) -> Engine:
    """Load a bundle's denoiser, or another of its graphs, in the form made for this engine; as `load_engine`."""
    name = preferred() if name is None else name
    return load_engine(bundle.graph(graph, name), name, threads)
