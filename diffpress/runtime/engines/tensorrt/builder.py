"""ONNX graph -> TensorRT plan, with numpy and TensorRT alone: the runtime can build again what does not fit.

The network is strongly typed: every tensor has the type that it has in the graph (float32, float16, bfloat16, and int8,
fp8 or fp4 between Q and DQ), and float32 products are not rounded to TF32 unless that is asked for. TensorRT-RTX builds
for the GPUs that are named, on any machine; TensorRT for the GPU that is here.
"""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from diffpress.runtime.bundle import sha256
from diffpress.runtime.engines.cache import cache_folder
from diffpress.runtime.engines.tensorrt import library as libraries
from diffpress.runtime.engines.tensorrt.messages import build_error, parse_error
from diffpress.runtime.engines.tensorrt.monitor import monitor
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.engines.tensorrt.profile import Shapes, profile_shapes
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError, MissingDependencyError, unknown_name
from diffpress.runtime.io.files import write_bytes
from diffpress.runtime.spec import DenoiserSpec

# where an ONNX file names another one that has weights of its: the entry 'location' of a tensor's external_data
DATA_FILE = re.compile(rb"\n\x08location\x12([\x01-\x7f])")


class BuiltEngine(NamedTuple):
    """The bytes of a plan, and what the manifest keeps of how it was made (all but file, engine and precision)."""

    data: bytes
    entry: dict[str, Any]


def build(
    graph: Path,
    spec: DenoiserSpec,
    options: BuildOptions,
    capabilities: Sequence[str] = (),
    *,
    part: str = "denoiser",
    quiet: bool = False,
) -> BuiltEngine:
    """Build `graph`, which is the bundle's graph `part`, for GPUs such as '8.9', or none: for the one that is here.

    Raises MissingDependencyError without a library, and InvalidInputError in one line for what cannot be built, naming the node if any.
    """
    name, capabilities = choose(capabilities)
    refuse_unsupported(name, options)
    trt = libraries.library(name)
    if not graph.is_file():
        raise InvalidInputError(f"{graph}: no such file")
    began = time.monotonic()
    logger = libraries.collector(trt)
    builder = trt.Builder(logger)
    network = _parsed(trt, builder, logger, graph, name)
    shapes = profile_shapes(_dimensions(network), spec, options, part)
    config = _configured(trt, builder, name, options, capabilities, shapes)
    observe = monitor(trt, f"{graph.name} for {', '.join(capabilities)}") if not quiet else None
    if observe is not None:
        config.progress_monitor = observe
    timing = None if name == libraries.RTX else _with_timing_cache(trt, config, capabilities[0])
    plan = builder.build_serialized_network(network, config)
    if observe is not None:
        observe.clear()
        if observe.interrupted:
            raise KeyboardInterrupt
    if plan is None:
        raise build_error(graph.name, name, logger.errors, options)
    if timing is not None:
        write_bytes(timing, bytes(config.get_timing_cache().serialize()))
    data = bytes(plan)  # what the builder gives can be read, but not sliced
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
        "build_seconds": round(time.monotonic() - began, 1),
    }
    return BuiltEngine(data, entry)


def choose(capabilities: Sequence[str]) -> tuple[str, list[str]]:
    """The library that builds for these compute capabilities, and them; for none the GPU's that is here.

    Raises MissingDependencyError where none is installed, InvalidInputError for an unknown capability and where no GPU is here to build
    for, or on.
    """
    found = libraries.installed()
    if not found:
        raise MissingDependencyError(libraries.RTX, libraries.EXTRA, "building TensorRT plans")
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
                f"TensorRT builds for the GPU that is here alone, and {error}; take tensorrt-rtx"
            ) from error
        raise unknown_name("compute capability", next(o for o in capabilities if o not in ahead), ahead) from error
    if not capabilities and here in ahead:
        return libraries.RTX, [here]
    # TensorRT-RTX's CURRENT is no way out for a GPU without a name: on 9.0 it built a plan that it then called invalid
    if libraries.CLASSIC in found and set(capabilities) <= {here}:
        return libraries.CLASSIC, [here]
    raise EngineUnavailableError(
        f"{' and '.join(found)} cannot build for compute capability {', '.join(capabilities) or here} on a GPU of "
        f"{here}; choose from {', '.join(ahead) or here}"
    )


def refuse_unsupported(library: str, options: BuildOptions) -> None:
    """Raise InvalidInputError for what this library does not have, and would pass over in silence."""
    if library != libraries.RTX:
        return
    if options.version_compatible:
        raise InvalidInputError(
            f"{library} has no version-compatible plans; leave that out, and rebuild where versions differ"
        )
    if options.hardware_compatible != "none":
        raise InvalidInputError(
            f"{library} has no hardware compatibility levels; name all compute capabilities instead"
        )


def graph_sha256(path: Path) -> str:
    """The sha256 of an ONNX file, and over those of the files that hold its weights where there are some."""
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
    """Input -> sides, by name where they are not fixed."""
    found: dict[str, list[int | str]] = {}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        sides = tuple(tensor.shape)
        found[tensor.name] = [tensor.get_dimension_name(i) if n == -1 else int(n) for i, n in enumerate(sides)]
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
    for name, wanted in flags.items():
        flag = getattr(trt.BuilderFlag, name)
        if wanted:
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
    """Give the config what earlier builds on such a GPU found out; returns the file it is kept in.

    (TensorRT-RTX measures nothing when it builds, and has no use for one.)
    """
    path = cache_folder() / "tensorrt" / f"timing-{trt.__version__}-{capability}.cache"
    known = path.read_bytes() if path.is_file() else b""
    config.set_timing_cache(config.create_timing_cache(known), False)
    return path
