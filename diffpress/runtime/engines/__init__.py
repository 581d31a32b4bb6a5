"""Inference engines for the graphs of a bundle. A backend is one module with these names, registered in ENGINES.

    EXTRA                       the extra of diffpress that installs its package (None: always installed)
    OPTIONS                     the fields of EngineOptions that it supports; others raise before `load` is called
    missing() -> str | None     the package to install, or None if it is installed
    unusable() -> str | None    the reason why this machine cannot run an installed backend, or None
    load(path, options, built) -> Engine
                                `path` is the ONNX graph; `built` are the bundle's prebuilt files for this engine and
                                graph, with their manifest entries. Raises EngineUnavailableError if this machine,
                                library version or graph is not supported (another engine may work), and
                                InvalidInputError for a file that cannot be read or run; both messages are one line.

An engine whose graphs may have slots for LoRAs is one of LORA_ENGINES and has an attribute `lora`, {input: float32
array}: inputs that it does not list among `inputs`, and reads from these arrays, which change in place, in every run.

Backends import their package inside functions, so listing them is cheap. The sampler only sees an `Engine`.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from diffpress.runtime.bundle import Bundle, PrebuiltEngine
from diffpress.runtime.engines.executed_layers import Profiler
from diffpress.runtime.engines.linked_files import without_links
from diffpress.runtime.engines.onnxruntime import engine as onnxruntime_engine
from diffpress.runtime.engines.onnxruntime.providers import CPU
from diffpress.runtime.engines.openvino import engine as openvino_engine
from diffpress.runtime.engines.options import EngineOptions, check_options
from diffpress.runtime.engines.precision_report import Kernel, PrecisionReport
from diffpress.runtime.engines.split import SplitEngine
from diffpress.runtime.engines.tensorrt import engine as tensorrt_engine
from diffpress.runtime.errors import (
    DiffpressError,
    EngineUnavailableError,
    InvalidInputError,
    MissingDependencyError,
    unknown_name,
)

logger = logging.getLogger(__name__)

# in order of preference
ENGINES: dict[str, ModuleType] = {
    "tensorrt": tensorrt_engine,
    "openvino": openvino_engine,
    "onnxruntime": onnxruntime_engine,
}

LORA_ENGINES = ("openvino", "onnxruntime")


class Engine(Protocol):
    """A loaded graph, callable from as many threads concurrently as its options have streams."""

    name: str
    device: str  # 'cpu', 'cuda', ...

    @property
    def inputs(self) -> Mapping[str, np.dtype]:
        """Inputs of the graph: name -> dtype."""

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Return the first output for one batch; the array is not reused by later calls."""

    def run_all(self, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return all outputs by name, for graphs with several."""

    def precision_report(
        self, example_inputs: dict[str, np.ndarray], quantized_layers: Collection[str] = ()
    ) -> PrecisionReport:
        """Report which convolutions and matrix products execute on integers, for inputs of these shapes.

        `quantized_layers` are the layers expected to run on integers (the manifest's `quantized_layers`).
        """

    def kernel_times(self, example_inputs: dict[str, np.ndarray], runs: int = 3) -> list[Kernel]:
        """Time each executed kernel for inputs of these shapes: median of `runs` runs after one warm-up run."""

    def profiler(self, example_inputs: dict[str, np.ndarray]) -> Profiler:
        """Return a profiler of a second instance of the graph, for inputs of these shapes.

        Raises:
            EngineUnavailableError: The engine does not report what its layers are.
        """

    def integer_mac_share(self, example_inputs: dict[str, np.ndarray]) -> float | None:
        """Return the integer MAC share of `precision_report`; None if the engine cannot report precision."""

    def close(self) -> None:
        """Release the engine's memory; it cannot run afterwards."""


def installed() -> list[str]:
    """List the engines whose package is installed, in order of preference."""
    return [name for name, backend in ENGINES.items() if backend.missing() is None]


def available() -> list[str]:
    """List the installed engines that this machine can run, in order of preference."""
    return [name for name in installed() if ENGINES[name].unusable() is None]


def preferred() -> str:
    """Return the engine that is tried first if none is named."""
    return next(iter(available()), "onnxruntime")


def load_engine(
    path: str | Path,
    name: str | None = None,
    threads: int | None = None,
    *,
    options: EngineOptions | None = None,
    built: Sequence[PrebuiltEngine] = (),
) -> Engine:
    """Load one graph file in an engine.

    Args:
        path: ONNX graph.
        name: Engine name; None picks the preferred available engine.
        threads: CPU threads; overrides `options.threads`.
        options: Engine options, default EngineOptions().
        built: Prebuilt engine files of the bundle with their manifest entries.

    Raises:
        InvalidInputError: Unknown engine, invalid or unsupported options, or an unreadable file.
        EngineUnavailableError: The engine cannot run this graph on this machine.
        MissingDependencyError: The engine's package is not installed.
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
    lora: bool = False,
) -> Engine:
    """Load the denoiser of a bundle, or another of its graphs, in the variant exported for this engine.

    If no engine is named and the preferred one is unavailable, the next one is tried, with a warning that states the
    reason. Arguments and errors are those of `load_engine`. `lora` loads the form of the graph with slots for LoRAs.
    """
    names = [name] if name is not None else _passed_first(bundle, available() or [preferred()])
    options = options or EngineOptions()
    for candidate in names:
        path = bundle.lora_graph(graph, candidate) if lora else bundle.graph(graph, candidate)
        # the bundle's hash covers all of its files
        cache = options.cache and options.cache.of(f"{bundle.hash} {path.relative_to(bundle.path).as_posix()}")
        try:
            if lora and candidate not in LORA_ENGINES:
                raise EngineUnavailableError(f"engine '{candidate}' runs no LoRAs; use {' or '.join(LORA_ENGINES)}")
            engine = load_engine(
                without_links(bundle, path),
                candidate,
                threads,
                options=replace(options, cache=cache),
                built=() if lora else bundle.prebuilt_engines(graph, candidate),
            )
            if graph == "denoiser":
                engine = _with_cached_graph(bundle, engine, threads, options, lora)
        except EngineUnavailableError as error:
            if candidate == names[-1]:
                raise
            logger.warning(f"{error}; trying the next engine")
            continue
        if graph == "denoiser":
            _warn_of_failed_parity(bundle, candidate)
        return engine
    raise AssertionError("unreachable: there is at least one name")


def _with_cached_graph(
    bundle: Bundle, engine: Engine, threads: int | None, options: EngineOptions, lora: bool
) -> Engine:
    """Return the engine with the cached graph, if the bundle's plan needs it.

    Raises:
        InvalidInputError: The bundle has none, or it does not match.
        EngineUnavailableError: The engine cannot keep features.
    """
    step_cache = bundle.spec.plan.cache
    if step_cache is None or step_cache.kind != "features":
        return engine
    if not hasattr(engine, "run_keeping"):
        engine.close()
        raise EngineUnavailableError(f"engine '{engine.name}' does not run the cached graph of the plan's step cache")
    path, features = bundle.cached_graph(engine.name, lora)
    if options.cache is not None:
        options = replace(options, cache=options.cache.of(f"{bundle.hash} {path.name}"))
    try:
        cached = load_engine(without_links(bundle, path), engine.name, threads, options=options)
        split: Engine = SplitEngine(engine, cached, features)
    except DiffpressError as error:
        engine.close()
        if isinstance(error, InvalidInputError):
            raise InvalidInputError(f"{path}: {error}") from error
        raise
    return split


def open_controlled(bundle: Bundle, name: str, options: EngineOptions) -> Engine:
    """Load the denoiser with residuals of control networks as inputs; errors are those of `load_engine`."""
    path = bundle.controlled_graph(name)
    cache = options.cache and options.cache.of(f"{bundle.hash} {path.name}")
    options = replace(options, cache=cache)
    return load_engine(without_links(bundle, path), name, options=options, built=bundle.engines_of(path, name))


def _passed_first(bundle: Bundle, names: list[str]) -> list[str]:
    """Return the engines with those last in which the bundle failed parity with torch when it was exported."""
    failed = {failure["engine"] for failure in bundle.manifest.get("parity_failures", [])}
    return sorted(names, key=lambda name: name in failed)


def _warn_of_failed_parity(bundle: Bundle, engine: str) -> None:
    """Warn of what failed when the bundle was exported: its gate, or this engine."""
    for failure in bundle.manifest.get("parity_failures", []):
        if failure["target"] or failure["engine"] == engine:
            logger.warning(f"{bundle.path}: failed parity with torch when it was exported: {failure['message']}")


def engine_label(engine: Engine) -> str:
    """Return the engine's name, with its device if that is not the CPU."""
    return engine.name if engine.device == CPU else f"{engine.name} ({engine.device})"
