"""Compatibility of an engine with this machine, checked from its manifest entry before anything is deserialized.

    library      installed in exactly the version that built the engine (or a later one of the same major version, if
                 the engine is version compatible)
    GPU          its compute capability is one of the engine's (or any from 8.0 on, for ampere_plus)
    graph        the ONNX graph has the sha256 of the graph the engine was built from
    shapes       within the engine's profile; batches above its maximum are split

An engine is a cache: an incompatible one is not used, and can be rebuilt from the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffpress.runtime.engines.tensorrt.library import Device

Profile = Mapping[str, Sequence[Sequence[int]]]


def incompatibility(entry: Mapping[str, Any], device: Device, graph_sha256: str) -> str | None:
    """Return why the engine of a manifest entry cannot run this graph on `device`, or None."""
    malformed = _malformed(entry)
    if malformed:
        return malformed
    library, version = entry["library"], entry["version"]
    if library not in device.libraries:
        return f"it was built with {library} {version}, which is not installed"
    here = device.libraries[library]
    options = entry["options"]
    newer_allowed = options.get("version_compatible") is True and _is_later(here, version)
    if here != version and not newer_allowed:
        return f"it was built with {library} {version}, and {here} is installed"
    if device.capability not in entry["compute_capabilities"] and not _compatible(options, entry, device.capability):
        built = ", ".join(entry["compute_capabilities"])
        return f"it was built for compute capability {built}, and this GPU has {device.capability}"
    if entry["graph_sha256"] != graph_sha256:
        return f"it was built from another {entry['graph']} than the present one"
    return None


def uncovered(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Return why these shapes lie outside a profile {input: (smallest, usual, largest)}, or None."""
    for name, shape in shapes.items():
        low, _, high = profile[name]
        if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            smallest, largest, actual = ("x".join(map(str, dims)) for dims in (low, high, shape))
            return f"{name} must be between {smallest} and {largest}, got {actual}"
    return None


def _malformed(entry: Mapping[str, Any]) -> str | None:
    texts = ("library", "version", "graph", "graph_sha256", "file", "sha256")
    capabilities, options, profile = (entry.get(key) for key in ("compute_capabilities", "options", "profile"))
    valid = all(isinstance(entry.get(key), str) for key in texts) and isinstance(options, dict)
    valid = valid and isinstance(capabilities, list) and all(isinstance(one, str) for one in capabilities)
    valid = (
        valid and isinstance(profile, dict) and bool(profile) and all(_is_range(entry) for entry in profile.values())
    )
    return None if valid else "its entry in the manifest is incomplete; export the bundle again"


def _is_range(found: Any) -> bool:
    """Return whether `found` is three integer shapes of equal rank."""
    if not (isinstance(found, list | tuple) and len(found) == 3):
        return False
    shapes = all(isinstance(s, list | tuple) and all(type(dim) is int for dim in s) for s in found)
    return shapes and len({len(s) for s in found}) == 1 and len(found[0]) > 0


def _is_later(here: str, built: str) -> bool:
    """Return whether `here` is `built` or later with the same major version, e.g. '10.13.2' and '10.9.0'."""
    try:
        now, then = ([int(number) for number in version.split(".")] for version in (here, built))
    except ValueError:
        return False
    return now[0] == then[0] and now >= then


def _compatible(options: Mapping[str, Any], entry: Mapping[str, Any], capability: str) -> bool:
    kind = options.get("hardware_compatible")
    try:
        major = int(capability.partition(".")[0])
    except ValueError:
        return False
    # 'same_compute_capability' is already covered by the list of capabilities
    return kind == "ampere_plus" and major >= 8
