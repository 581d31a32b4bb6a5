"""Whether a plan may run here, from its manifest entry and the facts of the machine, before anything is deserialized.

    library      installed, and in the very version that built it (or a later one of the same major version, where the
                 plan is version compatible)
    GPU          its compute capability is one of the plan's (or any from 8.0 on, where it is compatible with those)
    graph        the sha256 of the ONNX graph that is there is that of the graph it was built from
    shapes       within the plan's profile; batches above its largest are run in several parts

A plan is a cache: what does not fit is not used, and can be built again from the graph.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from diffpress.runtime.engines.tensorrt.library import Device

Profile = Mapping[str, Sequence[Sequence[int]]]


def incompatibility(entry: Mapping[str, Any], device: Device, graph_sha256: str) -> str | None:
    """Why a plan with this manifest entry cannot run on `device` for the graph with this hash; None where it can."""
    malformed = _malformed(entry)
    if malformed:
        return malformed
    library, version = entry["library"], entry["version"]
    if library not in device.libraries:
        return f"it was built with {library} {version}, which is not installed"
    here = device.libraries[library]
    options = entry["options"]
    later = options.get("version_compatible") is True and _is_later(here, version)
    if here != version and not later:
        return f"it was built with {library} {version}, and {here} is installed"
    if device.capability not in entry["compute_capabilities"] and not _compatible(options, entry, device.capability):
        built = ", ".join(entry["compute_capabilities"])
        return f"it was built for compute capability {built}, and this GPU has {device.capability}"
    if entry["graph_sha256"] != graph_sha256:
        return f"it was built from another {entry['graph']} than the one that is there"
    return None


def uncovered(profile: Profile, shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why inputs of these shapes lie outside of a plan's profile {input: (least, usual, largest)}; None where not."""
    for name, shape in shapes.items():
        low, _, high = profile[name]
        if len(shape) != len(low) or any(not a <= n <= b for a, n, b in zip(low, shape, high, strict=True)):
            least, largest, asked = ("x".join(map(str, sides)) for sides in (low, high, shape))
            return f"it takes {name} from {least} to {largest}, and {asked} is asked for"
    return None


def _malformed(entry: Mapping[str, Any]) -> str | None:
    texts = ("library", "version", "graph", "graph_sha256", "file", "sha256")
    capabilities, options, profile = (entry.get(key) for key in ("compute_capabilities", "options", "profile"))
    well = all(isinstance(entry.get(key), str) for key in texts) and isinstance(options, dict)
    well = well and isinstance(capabilities, list) and all(isinstance(one, str) for one in capabilities)
    well = well and isinstance(profile, dict) and bool(profile) and all(_is_range(entry) for entry in profile.values())
    return None if well else "its entry in the manifest is incomplete; export the bundle again"


def _is_range(found: Any) -> bool:
    """Three shapes of one length, of whole numbers."""
    if not (isinstance(found, list | tuple) and len(found) == 3):
        return False
    shapes = all(isinstance(s, list | tuple) and all(type(side) is int for side in s) for s in found)
    return shapes and len({len(s) for s in found}) == 1 and len(found[0]) > 0


def _is_later(here: str, built: str) -> bool:
    """'10.13.2' after '10.9.0', of the same major version."""
    try:
        now, then = ([int(part) for part in version.split(".")] for version in (here, built))
    except ValueError:
        return False
    return now[0] == then[0] and now >= then


def _compatible(options: Mapping[str, Any], entry: Mapping[str, Any], capability: str) -> bool:
    kind = options.get("hardware_compatible")
    try:
        major = int(capability.partition(".")[0])
    except ValueError:
        return False
    # 'same_compute_capability' is what the list of capabilities says already
    return kind == "ampere_plus" and major >= 8
