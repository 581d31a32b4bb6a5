"""Which plan is run: one built ahead that fits, one that was rebuilt before, or a new one from the ONNX graph."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import MANIFEST, Built
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.tensorrt.builder import build, graph_sha256
from diffpress.runtime.engines.tensorrt.compatibility import incompatibility
from diffpress.runtime.engines.tensorrt.library import Device
from diffpress.runtime.engines.tensorrt.options import BuildOptions
from diffpress.runtime.errors import EngineUnavailableError, InvalidInputError
from diffpress.runtime.io.files import read_json
from diffpress.runtime.spec import DenoiserSpec


def engine_for(
    path: Path, options: EngineOptions, built: Sequence[Built], device: Device
) -> tuple[bytes, dict[str, Any]]:
    """Bytes and manifest entry of the first plan that fits `device`, of those built ahead and then those rebuilt.

    None that fits raises Unfit with the reason of each, or builds one (`options.rebuild`) and keeps it in the cache.
    """
    graph, reasons = graph_sha256(path), []
    for file, entry in built:
        reason = incompatibility(entry, device, graph)
        if reason is None:
            plan = file.read_bytes() if file.is_file() else b""
            if hashlib.sha256(plan).hexdigest() == entry["sha256"]:
                return plan, entry
            reason = "the file is missing or damaged"
        reasons.append(f"{file.name}: {reason}")
    settings = _settings(path, built)
    kept = _kept(options.cache, settings, device)
    if kept is not None:
        return kept
    if not options.rebuild:
        found = "; ".join(reasons) or "none was built for it"
        raise EngineUnavailableError(f"no TensorRT plan of {path.name} fits here ({found}); build one with --rebuild")
    made = build(path, _spec_beside(path), settings, [device.capability], part=_part_of(path))
    if options.cache is not None:
        key = _key(settings, made.entry["library"], made.entry["version"], device.capability)
        options.cache.write(f"{key} plan", made.data)
        options.cache.write(f"{key} entry", json.dumps(made.entry).encode())
    return made.data, made.entry


def _settings(path: Path, built: Sequence[Built]) -> BuildOptions:
    """How the bundle's own plans were built, to build another in the same way."""
    found: Any = next((entry["options"] for _, entry in built if "options" in entry), {})
    return BuildOptions.from_json(found, str(path))


def _kept(cache: Cache | None, settings: BuildOptions, device: Device) -> tuple[bytes, dict[str, Any]] | None:
    """The plan that was rebuilt for such a device before."""
    for library, version in device.libraries.items():
        key = _key(settings, library, version, device.capability)
        entry, plan = (None, None) if cache is None else (cache.read(f"{key} entry"), cache.read(f"{key} plan"))
        if entry is not None and plan is not None:
            return plan, json.loads(entry)
    return None


def _key(settings: BuildOptions, library: str, version: str, capability: str) -> str:
    return f"{library} {version} {capability} {json.dumps(settings.to_json())}"


def _spec_beside(path: Path) -> DenoiserSpec:
    """The spec of the bundle that the graph lies in, whose manifest was verified when the bundle was opened."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        raise InvalidInputError(
            f"{path}: only graphs of a bundle can be built again; this one has no {MANIFEST} beside it"
        )
    return DenoiserSpec.from_json(read_json(manifest).get("spec"), f"{manifest}: spec")


def _part_of(path: Path) -> str:
    """'denoiser.tensorrt.onnx' -> 'denoiser'."""
    return path.name.split(".", 1)[0]
