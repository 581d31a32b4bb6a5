"""Target `tensorrt`: one TensorRT-RTX plan, built ahead of time for the GPUs that were named, on a machine without any.

    engines/tensorrt/denoiser_sm86_sm89.plan      batch MIN..MAX, tuned for OPT

One plan serves several compute capabilities at the size of one, since they share the weights. It runs on those alone,
and only in the library version it was built with: the manifest keeps both, with the hash of the graph. A plan's bytes
are not the same from build to build, so a bundle with this target is the one kind whose hash does not repeat.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from compress.adapters import example_inputs
from runtime.bundle import sha256
from runtime.errors import BadInput, MissingExtra, unknown_name
from runtime.spec import DenoiserSpec

MIN, OPT, MAX = 1, 8, 64


def build_plan(graph: Path, folder: Path, capabilities: Sequence[str], spec: DenoiserSpec) -> dict[str, Any]:
    """Build `graph` for compute capabilities such as '8.6' into `folder`/engines; returns the manifest entry.

    Raises MissingExtra without tensorrt-rtx, and BadInput for no or an unknown capability and for a graph that
    TensorRT cannot parse or build (naming the node).
    """
    trt, targets = check_capabilities(capabilities)
    plan = _build(trt, graph, targets, spec)
    name = "_".join(["denoiser", *(target.name.lower() for target in targets)])
    path = folder / "engines" / "tensorrt" / f"{name}.plan"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(plan)
    return {
        "engine": "tensorrt-rtx",
        "version": trt.__version__,
        "graph": graph.name,
        "graph_sha256": sha256(graph),
        "file": path.relative_to(folder).as_posix(),
        "compute_capabilities": list(capabilities),
        "batch": {"min": MIN, "opt": OPT, "max": MAX},
    }


def check_capabilities(capabilities: Sequence[str]) -> tuple[Any, list[Any]]:
    """The library and its names for `capabilities`; raises as `build_plan` does where either is missing or unknown."""
    trt = _library()
    if not capabilities:
        raise BadInput("target tensorrt: name the GPUs to build for, as in --compute-capability 8.6 8.9 12.0")
    return trt, [_capability(trt, text) for text in capabilities]


def _library() -> Any:
    if importlib.util.find_spec("tensorrt_rtx") is None:
        raise MissingExtra("tensorrt-rtx", "tensorrt", "target tensorrt")
    import tensorrt_rtx

    return tensorrt_rtx


def _capability(trt: Any, text: str) -> Any:
    """'8.9' -> trt.ComputeCapability.SM89."""
    known = {
        f"{name[2:-1]}.{name[-1]}": value
        for name, value in trt.ComputeCapability.__members__.items()
        if name.startswith("SM")
    }
    if text not in known:
        raise unknown_name("compute capability", text, known)
    return known[text]


def _build(trt: Any, graph: Path, targets: list[Any], spec: DenoiserSpec) -> Any:
    logger = _logger(trt)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(graph)):
        error = parser.get_error(0)
        where = f"node '{error.node_name()}' ({error.node_operator()})"
        raise BadInput(f"{graph.name}: TensorRT cannot parse {where}: {_one_line(error.desc())}")
    config, profile = builder.create_builder_config(), builder.create_optimization_profile()
    # height, width and the text's length are those the spec has: one profile, for the batch
    shapes = {name: tuple(example.shape[1:]) for name, example in example_inputs(spec, 1).items()}
    for index in range(network.num_inputs):
        tensor = network.get_input(index)
        rest = shapes[tensor.name]
        profile.set_shape(tensor.name, (MIN, *rest), (OPT, *rest), (MAX, *rest))
    config.add_optimization_profile(profile)
    config.num_compute_capabilities = len(targets)
    for index, target in enumerate(targets):
        config.set_compute_capability(target, index)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        reason = _one_line(logger.errors[0] if logger.errors else "")
        raise BadInput(f"{graph.name}: TensorRT cannot build it: {reason}")
    return plan


def _logger(trt: Any) -> Any:
    class Collector(trt.ILogger):  # type: ignore[misc]
        """Keeps what would go to stderr, to be said in one line."""

        def __init__(self) -> None:
            super().__init__()
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.ERROR, trt.ILogger.INTERNAL_ERROR):
                self.errors.append(message)

    return Collector()


def _one_line(text: str) -> str:
    return " ".join(text.split())[:300] or "no reason given"
