"""Target `tensorrt`: plans of all of a bundle's graphs, for the GPUs that were named, on a machine without any.

    engines/tensorrt/denoiser_sm86_sm89.plan      batch MIN..MAX, tuned for OPT
    engines/tensorrt/vae_decoder_sm86_sm89.plan   ... and the text encoders, where the model has them

One plan serves several compute capabilities at the size of one, since they share the weights. It runs on those alone,
and only in the library version it was built with: the manifest keeps both, with the hash of the graph, the shapes and
the options it was built with and the seconds that took. (A plan's bytes are not the same from build to build, so a
bundle with this target is the one kind whose hash does not repeat anyway.) The builder is the runtime's own, which can
build again what does not fit: runtime/engines/tensorrt/builder.py.
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
    part: str = "denoiser",
    precision: str = "fp32",
) -> dict[str, Any]:
    """Build `graph` for compute capabilities such as '8.6' into `folder`/engines; returns the manifest entry.

    `part` is its name among the bundle's graphs and `precision` what it computes in. Raises MissingDependencyError without a
    library, and InvalidInputError for no or an unknown capability and for a graph that cannot be parsed or built (naming the
    node).
    """
    made = build(graph, spec, options, capabilities, part=part)
    targets = "_".join("sm" + one.replace(".", "") for one in made.entry["compute_capabilities"])
    path = folder / "engines" / ENGINE / f"{part}_{targets}.plan"
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
    """`build_engine` for each of a bundle's graphs, name -> (file, precision); returns their manifest entries.

    A plan that `made_before` holds of the very same graph, built in the same way, is taken over: parts of a pipeline
    stay what they are when its denoiser is compressed.
    """
    entries = []
    for part, (graph, precision) in graphs.items():
        entry = None if made_before is None else _taken_over(made_before, part, graph, capabilities, options, folder)
        entries.append(
            entry or build_engine(graph, folder, capabilities, spec, options, part=part, precision=precision)
        )
    return entries


def _taken_over(
    bundle: Bundle, part: str, graph: Path, capabilities: Sequence[str], options: BuildOptions, folder: Path
) -> dict[str, Any] | None:
    for file, entry in bundle.built(part, ENGINE):
        same = entry["compute_capabilities"] == list(capabilities) and entry["graph_sha256"] == graph_sha256(graph)
        if same and BuildOptions.from_json(entry["options"], str(file)) == options:
            path = folder / entry["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.hardlink_to(file)
            return entry
    return None


def check_build(capabilities: Sequence[str], options: BuildOptions = DEFAULTS) -> None:
    """Raise, as `build_engine` would, for what can be refused before any work."""
    library, _ = choose(capabilities)
    refuse_unsupported(library, options)


def tensorrt_line(entry: Mapping[str, Any]) -> str:
    """One line on a plan, from its manifest entry."""
    low, usual, high = entry["options"]["batch"]
    targets = ", ".join(entry["compute_capabilities"])
    return (
        f"{entry['library']} {entry['version']}: {entry['file']} {entry['bytes'] / 2**20:.2f} MiB, "
        f"{entry['precision']} for compute capability {targets}, batch {low} to {high} (tuned for {usual}), "
        f"built in {entry['build_seconds']:.1f} s, not run"
    )
