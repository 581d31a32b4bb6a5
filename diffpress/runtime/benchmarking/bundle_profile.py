"""Profile of a bundle's graph in an engine, with what it was measured on and what is worth doing."""

from __future__ import annotations

from contextlib import closing
from typing import Any

import numpy as np

from diffpress.runtime.benchmarking.advice import findings
from diffpress.runtime.benchmarking.bench import machine
from diffpress.runtime.benchmarking.peaks import measured_peaks
from diffpress.runtime.benchmarking.profiling import measure, profile_of
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.split import SplitEngine
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.engines.tensorrt.profile import AUTOENCODER, profile_shapes
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.image_size import sized
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.spec import DenoiserSpec

DENOISER, CACHED = "denoiser", "cached"


def components(bundle: Bundle) -> list[str]:
    """Return what `profile_bundle` takes as a component: the bundle's graphs, and the cached graph of a step cache."""
    cache = bundle.spec.plan.cache
    has_cached = cache is not None and cache.kind == "features"
    return [*bundle.manifest["graphs"], *([CACHED] if has_cached else [])]


def profile_bundle(
    bundle: Bundle,
    engine: str | None = None,
    *,
    component: str = DENOISER,
    batch: int = 1,
    size: tuple[int, int] | None = None,
    options: EngineOptions | None = None,
) -> dict[str, Any]:
    """Profile one evaluation of a bundle's graph under its sampling plan.

    Args:
        bundle: The opened bundle.
        engine: Engine name; None picks the preferred available engine.
        component: One of `components`.
        batch: Images of the evaluation; under guidance the denoiser evaluates twice as many. Autoencoders run one.
        size: Height and width in pixels; default: the bundle's own.
        options: Options of the engine.

    Returns:
        The fields of profiling.profile_of, "findings", and what was measured on what.

    Raises:
        InvalidInputError: An argument does not fit the bundle.
        EngineUnavailableError: The engine cannot run here, or does not report what its layers are.
    """
    if component not in components(bundle):
        raise unknown_name("component", component, components(bundle))
    if batch < 1:
        raise InvalidInputError(f"batch {batch}: must be at least 1")
    options = options or EngineOptions()
    if options.streams != 1:
        raise InvalidInputError(f"{options.streams} streams: a profile is that of one evaluation; use 1")
    spec = sized(bundle, size)
    graph = DENOISER if component == CACHED else component
    with closing(open_engine(bundle, engine, graph=graph, options=options)) as opened:
        spec = bundle.spec_for(opened.name, spec)
        network, inputs = _evaluation(bundle, opened, component, spec, batch)
        name, times = opened.name, measure(network, inputs)
    profile = profile_of(times, measured_peaks(name, options))
    entry = bundle.manifest["graphs"][graph]
    quantized = entry.get("variants", {}).get(name, entry).get("quantized_layers", entry.get("quantized_layers", ()))
    found = findings(profile, quantized)
    return {
        "bundle": {"name": bundle.manifest.get("name"), "hash": bundle.hash},
        "engine": name,
        "component": component,
        "batch": batch,
        "sample_shape": list(spec.sample_shape),
        "threads": options.threads,
        "precision": options.precision,
        "machine": machine(),
        **profile,
        "findings": [finding._asdict() for finding in found],
    }


def _evaluation(
    bundle: Bundle, opened: Engine, component: str, spec: DenoiserSpec, batch: int
) -> tuple[Engine, dict[str, np.ndarray]]:
    """Return the engine of the graph to measure, and the inputs of one evaluation."""
    if component not in (DENOISER, CACHED):
        return opened, _component_inputs(bundle, component, spec, batch)
    inputs = dummy_inputs(opened, spec, batch)
    if component == DENOISER:
        return opened, inputs
    assert isinstance(opened, SplitEngine)
    every = {**inputs, **opened.run_all(inputs)}
    return opened.cached, {name: every[name] for name in opened.cached.inputs}


def _component_inputs(bundle: Bundle, component: str, spec: DenoiserSpec, batch: int) -> dict[str, np.ndarray]:
    """Return inputs of another graph than the denoiser: noise, and zeros for integers such as tokens."""
    entries = bundle.manifest["graphs"][component]["inputs"]
    dimensions = {name: entry["shape"] for name, entry in entries.items()}
    count = 1 if component in AUTOENCODER else batch
    shapes = profile_shapes(dimensions, spec, BuildOptions(batch=(count, count, count)), component)
    noise = np.random.Generator(np.random.Philox(0))
    found = {}
    for name, entry in entries.items():
        kind, (_, shape, _) = np.dtype(entry["dtype"]), shapes[name]
        found[name] = noise.standard_normal(shape).astype(kind) if kind.kind == "f" else np.zeros(shape, kind)
    return found
