"""Target `tensorrt`: build engines of all of a bundle's graphs ahead of time, without a GPU.

    engines/tensorrt/denoiser_sm86_sm89.engine    batch MIN..MAX, tuned for OPT
    engines/tensorrt/vae_decoder_sm86_sm89.engine and the text encoders, if the model has them

One engine serves several compute capabilities without growing, because they share the weights. It runs only on those
GPUs and only in the library version it was built with. The manifest records both, together with the graph's hash, the
shapes, the build options and the build time. (TensorRT builds are not reproducible byte for byte, so a bundle with
this target has no reproducible hash.) The builder is part of the runtime, which can rebuild an engine that does not
fit: runtime/engines/tensorrt/builder.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines.tensorrt.builder import build, choose, graph_sha256, refuse_unsupported
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.io.files import write_bytes
from diffpress.runtime.spec import DenoiserSpec

ENGINE = "tensorrt"
DEFAULTS = BuildOptions()


def build_engine(
    graph: Path,
    folder: Path,
    capabilities: Sequence[str],
    spec: DenoiserSpec,
    options: BuildOptions = DEFAULTS,
    *,
    component: str = "denoiser",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Build an engine of `graph` into `folder`/engines.

    Args:
        graph: The ONNX file.
        folder: The bundle's folder.
        capabilities: Compute capabilities such as '8.6'.
        spec: The denoiser's spec.
        options: Build options.
        component: Name of the graph in the bundle.
        precision: The precision that the graph computes in, for the manifest.

    Returns:
        The manifest entry.

    Raises:
        MissingDependencyError: If no TensorRT library is installed.
        InvalidInputError: For a missing or unknown compute capability, and for a graph that cannot be parsed or built
            (the message names the node).
    """
    made = build(graph, spec, options, capabilities, component=component)
    targets = "_".join("sm" + one.replace(".", "") for one in made.entry["compute_capabilities"])
    path = folder / "engines" / ENGINE / f"{component}_{targets}.engine"
    write_bytes(path, made.data)
    return {
        "engine": ENGINE,
        "file": path.relative_to(folder).as_posix(),
        "precision": precision,
        **made.entry,
    }


def build_engines(
    folder: Path,
    graphs: Mapping[str, tuple[Path, str]],
    capabilities: Sequence[str],
    spec: DenoiserSpec,
    options: BuildOptions = DEFAULTS,
    made_before: Bundle | None = None,
) -> list[dict[str, Any]]:
    """Build engines of all graphs of a bundle, given as name -> (file, precision).

    An engine in `made_before` is reused if its graph and build options are identical; a pipeline's other components do
    not change when its denoiser is compressed.

    Returns:
        The manifest entries.
    """
    entries = []
    for component, (graph, precision) in graphs.items():
        entry = None if made_before is None else _reused(made_before, component, graph, capabilities, options, folder)
        entries.append(
            entry or build_engine(graph, folder, capabilities, spec, options, component=component, precision=precision)
        )
    return entries


def _reused(
    bundle: Bundle, component: str, graph: Path, capabilities: Sequence[str], options: BuildOptions, folder: Path
) -> dict[str, Any] | None:
    for file, entry in bundle.prebuilt_engines(component, ENGINE):
        same = entry["compute_capabilities"] == list(capabilities) and entry["graph_sha256"] == graph_sha256(graph)
        if same and BuildOptions.from_json(entry["options"], str(file)) == options:
            path = folder / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(file)
            return entry
    return None


def check_build(capabilities: Sequence[str], options: BuildOptions = DEFAULTS) -> None:
    """Raise the errors of `build_engine` that can be detected without building."""
    library, _ = choose(capabilities)
    refuse_unsupported(library, options)


def tensorrt_line(entry: Mapping[str, Any]) -> str:
    """Describe an engine in one line, from its manifest entry."""
    low, optimum, high = entry["options"]["batch"]
    targets = ", ".join(entry["compute_capabilities"])
    return (
        f"{entry['library']} {entry['version']}: {entry['file']} {entry['bytes'] / 2**20:.2f} MiB, "
        f"{entry['precision']} for compute capability {targets}, batch {low} to {high} (tuned for {optimum}), "
        f"built in {entry['build_seconds']:.1f} s, not run"
    )
