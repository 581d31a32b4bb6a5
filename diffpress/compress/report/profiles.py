"""Profiles of the engine before and after a run: of the teacher's bundle and of the result's, measured for the report.

    profile.json    {"baseline": profile, "bundle": profile}, each as `diffpress profile --json` writes it

They are measured if both graphs can be profiled in seconds, and again if a bundle has changed. A report without them
lacks only what they show.
"""

from __future__ import annotations

from typing import Any

from diffpress.compress.workspace import Workspace
from diffpress.runtime.benchmarking.bundle_profile import profile_bundle
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.engines import available
from diffpress.runtime.engines.cache import Cache, cache_folder
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import DiffpressError
from diffpress.runtime.io.files import read_json, write_json

ENGINES = ("openvino", "onnxruntime")  # that have a profiler, in order of preference
MOST_MIB = 256.0  # of a graph that is profiled in seconds
FIELDS = {"engine", "batch", "step_ms", "profiled_ms", "layers_ms", "disturbed", "peaks", "operations", "layers"}
FIELDS |= {"bundle", "findings"}


def measure_profiles(run: Workspace) -> str | None:
    """Write the profiles of a run's bundles, unless they are there; return what prevents it, if something does."""
    bundle, baseline = load_bundle(run.bundle), load_bundle(run.baseline)  # the first is missing in a run killed early
    bundles = {"baseline": baseline, "bundle": bundle}
    if profiles_of(run, bundles) is not None:
        return None
    engine = next((name for name in ENGINES if name in available()), None)
    largest = max(bundle.manifest["graphs"]["denoiser"].get("bytes", 0) / 2**20 for bundle in bundles.values())
    if engine is None:
        return "no engine here has a profiler"
    if largest > MOST_MIB:
        return f"a graph has {largest:.0f} MiB; 'diffpress profile BUNDLE' takes any graph"
    options = EngineOptions(cache=Cache(cache_folder()))
    try:
        found = {name: profile_bundle(bundle, engine, options=options) for name, bundle in bundles.items()}
    except DiffpressError as error:
        return str(error)
    write_json(run.profile, found)
    return None


def profiles_of(run: Workspace, bundles: dict[str, Bundle]) -> dict[str, Any] | None:
    """Return the stored profiles of these bundles, of 'baseline' and 'bundle'; None if they are of others.

    Raises:
        InvalidInputError: The file cannot be read.
    """
    if not run.profile.is_file():
        return None
    found = read_json(run.profile, "remove it")
    for name, bundle in bundles.items():
        entry = found.get(name)
        if not isinstance(entry, dict) or not entry.keys() >= FIELDS or entry["bundle"].get("hash") != bundle.hash:
            return None
    return found


def with_profile(layers: list[dict[str, Any]], profiles: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the layers of a precision map with their share of the MACs and their ms, None if they are not known."""
    rows = [] if profiles is None else profiles["bundle"]["layers"]
    total = sum(row["macs"] for row in rows)
    macs, ms = dict[str, int](), dict[str, float]()
    for row in rows:
        if row["macs"]:
            macs[row["name"]] = macs.get(row["name"], 0) + row["macs"]
            ms[row["name"]] = ms.get(row["name"], 0.0) + row["ms"]
    return [
        layer
        | {
            "mac_share": macs[layer["layer"]] / total if layer["layer"] in macs else None,
            "ms": ms.get(layer["layer"]),
        }
        for layer in layers
    ]
