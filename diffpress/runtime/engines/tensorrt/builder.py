"""Build a TensorRT engine from an ONNX graph, with numpy and TensorRT only, so that the runtime can rebuild engines.

The network is strongly typed: every tensor keeps its type in the graph (float32, float16, bfloat16, and int8, fp8 or
fp4 between Q and DQ), and float32 products use TF32 only on request. TensorRT-RTX builds for the named GPUs on any
machine; TensorRT builds only for the local GPU.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffpress.runtime.bundle import sha256
from diffpress.runtime.engines.cache import TENSORRT, cache_folder
from diffpress.runtime.engines.tensorrt import library as libraries
from diffpress.runtime.engines.tensorrt.messages import build_error, parse_error
from diffpress.runtime.engines.tensorrt.monitor import monitor
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.engines.tensorrt.profile import Shapes, profile_shapes
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError, MissingDependencyError, unknown_name
from diffpress.runtime.io.files import write_bytes
from diffpress.runtime.spec import DenoiserSpec

# the 'location' entry of a tensor's external_data, which names a weight file
DATA_FILE = re.compile(rb"\n\x08location\x12([\x01-\x7f])")


class BuiltEngine(NamedTuple):
    """A serialized engine and its manifest entry (without file, engine and precision)."""

    data: bytes
    entry: dict[str, Any]


def build(
    graph: Path,
    spec: DenoiserSpec,
    options: BuildOptions,
    capabilities: Sequence[str] = (),
    *,
    component: str = "denoiser",
) -> BuiltEngine:
    """Build an engine from an ONNX graph.

    Args:
        graph: ONNX file.
        spec: Spec of the denoiser, which gives the shapes of the profile.
        options: Build options.
        capabilities: Compute capabilities of the GPUs to build for, e.g. '8.9'; empty means the local GPU.
        component: Name of the graph in the bundle.

    Raises:
        MissingDependencyError: No TensorRT library is installed.
        EngineUnavailableError: The installed libraries cannot build for these GPUs.
        InvalidInputError: The graph cannot be built; the one-line message names the node, if known.
    """
    name, capabilities = choose(capabilities)
    refuse_unsupported(name, options)
    trt = libraries.library(name)
    if not graph.is_file():
        raise InvalidInputError(f"{graph}: no such file")
    start = time.monotonic()
    logger = libraries.collector(trt)
    builder = trt.Builder(logger)
    network = _parsed(trt, builder, logger, graph, name)
    shapes = profile_shapes(_dimensions(network), spec, options, component)
    config = _configured(trt, builder, name, options, capabilities, shapes)
    progress = monitor(trt, f"{graph.name} for {', '.join(capabilities)}")
    config.progress_monitor = progress
    timing = None if name == libraries.RTX else _with_timing_cache(trt, config, capabilities[0])
    serialized = builder.build_serialized_network(network, config)
    progress.clear()
    if progress.interrupted:
        raise KeyboardInterrupt
    if serialized is None:
        raise build_error(graph.name, name, logger.errors, options)
    if timing is not None:
        write_bytes(timing, bytes(config.get_timing_cache().serialize()))
    data = bytes(serialized)  # the builder's buffer cannot be sliced
    entry = {
        "library": name,
        "version": str(trt.__version__),
        "graph": graph.name,
        "graph_sha256": graph_sha256(graph),
        "sha256": hashlib.sha256(data).hexdigest(),
        "bytes": len(data),
        "compute_capabilities": list(capabilities),
        "profile": {name: [list(shape) for shape in entry] for name, entry in shapes.items()},
        "options": options.to_json(),
        "build_seconds": round(time.monotonic() - start, 1),
    }
    return BuiltEngine(data, entry)


def choose(capabilities: Sequence[str]) -> tuple[str, list[str]]:
    """Return the library that builds for these compute capabilities, and the capabilities (default: the local GPU's).

    Raises:
        MissingDependencyError: No TensorRT library is installed.
        InvalidInputError: A capability is unknown, or a local GPU is needed and there is none.
        EngineUnavailableError: The installed libraries cannot build for these capabilities on this machine.
    """
    found = libraries.installed()
    if not found:
        raise MissingDependencyError(libraries.RTX, libraries.EXTRA, "building TensorRT engines")
    ahead = libraries.targets(libraries.library(libraries.RTX)) if libraries.RTX in found else {}
    if capabilities and all(one in ahead for one in capabilities):
        return libraries.RTX, list(dict.fromkeys(capabilities))
    try:
        here = libraries.gpu_capability(libraries.cuda_runtime())
    except (MissingDependencyError, EngineUnavailableError) as error:
        if not capabilities:
            raise InvalidInputError(
                "target tensorrt: name the GPUs to build for, as in --compute-capability 8.6 8.9"
            ) from error
        if not ahead:
            raise InvalidInputError(
                f"TensorRT builds only for the local GPU ({error}); install tensorrt-rtx"
            ) from error
        raise unknown_name("compute capability", next(o for o in capabilities if o not in ahead), ahead) from error
    if not capabilities and here in ahead:
        return libraries.RTX, [here]
    # TensorRT-RTX's CURRENT does not help with an unlisted GPU: on 9.0 it built an engine that it then rejected
    if libraries.CLASSIC in found and set(capabilities) <= {here}:
        return libraries.CLASSIC, [here]
    raise EngineUnavailableError(
        f"{' and '.join(found)} cannot build for compute capability {', '.join(capabilities) or here} on a GPU of "
        f"{here}; choose from {', '.join(ahead) or here}"
    )


def refuse_unsupported(library: str, options: BuildOptions) -> None:
    """Raise InvalidInputError for options that this library does not support and would silently ignore."""
    if library != libraries.RTX:
        return
    if options.version_compatible:
        raise InvalidInputError(
            f"{library} has no version-compatible engines; omit that option, and rebuild where versions differ"
        )
    if options.hardware_compatible != "none":
        raise InvalidInputError(
            f"{library} has no hardware compatibility levels; list all compute capabilities instead"
        )


def graph_sha256(path: Path) -> str:
    """Return the sha256 of an ONNX file, combined with those of its external weight files, if any."""
    lengths = DATA_FILE.finditer(path.read_bytes())
    found = {match.string[match.end() : match.end() + match[1][0]] for match in lengths}
    files = sorted(path.parent / name.decode(errors="replace") for name in found)
    own = sha256(path)
    if not files:
        return own
    every = [own, *(sha256(file) for file in files if file.is_file())]
    return hashlib.sha256("".join(every).encode()).hexdigest()


def _parsed(trt: Any, builder: Any, logger: Any, graph: Path, library: str) -> Any:
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        raise parse_error(graph.name, library, parser.get_error(0) if parser.num_errors else None)
    return network


def _dimensions(network: Any) -> dict[str, list[int | str]]:
    """Map each input to its dimensions: an int, or the name of a dynamic one."""
    found: dict[str, list[int | str]] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        dims = tuple(tensor.shape)
        found[tensor.name] = [tensor.get_dimension_name(i) if n == -1 else int(n) for i, n in enumerate(dims)]
    return found


def _configured(
    trt: Any, builder: Any, library: str, options: BuildOptions, capabilities: Sequence[str], shapes: Shapes
) -> Any:
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    for name, (low, usual, high) in shapes.items():
        profile.set_shape(name, low, usual, high)
    config.add_optimization_profile(profile)
    config.builder_optimization_level = options.optimization_level
    if options.workspace_mib is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_mib << 20)
    flags = {
        "TF32": options.tf32,
        "SPARSE_WEIGHTS": options.sparse_weights,
        "WEIGHT_STREAMING": options.stream_weights,
        "STRIP_PLAN": options.strip_weights,
        "REFIT_IDENTICAL": options.strip_weights,
        "VERSION_COMPATIBLE": options.version_compatible,
    }
    for name, enabled in flags.items():
        flag = getattr(trt.BuilderFlag, name)
        if enabled:
            config.set_flag(flag)
        else:
            config.clear_flag(flag)
    if library == libraries.RTX:
        known = libraries.targets(trt)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            config.set_compute_capability(known[capability], index)
    elif options.hardware_compatible != "none":
        levels = trt.HardwareCompatibilityLevel.__members__
        level = options.hardware_compatible.upper()
        if level not in levels:
            raise InvalidInputError(
                f"{library} {trt.__version__} has no hardware compatibility '{options.hardware_compatible}'"
            )
        config.hardware_compatibility_level = levels[level]
    return config


def _with_timing_cache(trt: Any, config: Any, capability: str) -> Path:
    """Set the timing cache of earlier builds for this GPU; returns the file it is stored in.

    (TensorRT-RTX does not time kernels while building and needs none.)
    """
    path = cache_folder() / TENSORRT / f"timing-{trt.__version__}-{capability}.cache"
    timings = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(timings), False)
    return path
