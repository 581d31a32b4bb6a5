"""Select the TensorRT engine to run: a compatible prebuilt one, a rebuilt one from the cache, or a new build."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import MANIFEST, PrebuiltEngine
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
    path: Path, options: EngineOptions, built: Sequence[PrebuiltEngine], device: Device
) -> tuple[bytes, dict[str, Any]]:
    """Return bytes and manifest entry of the first engine that fits `device`.

    Prebuilt engines are tried first, then rebuilt ones in the cache. If none fits and `options.rebuild` is set, an
    engine is built and stored in the cache.

    Raises:
        EngineUnavailableError: No engine fits; the message lists the reason for each.
    """
    graph, reasons = graph_sha256(path), []
    for file, entry in built:
        reason = incompatibility(entry, device, graph)
        if reason is None:
            data = file.read_bytes() if file.is_file() else b""
            if hashlib.sha256(data).hexdigest() == entry["sha256"]:
                return data, entry
            reason = "the file is missing or damaged"
        reasons.append(f"{file.name}: {reason}")
    settings = _settings(path, built)
    cached = _cached(options.cache, settings, device)
    if cached is not None:
        return cached
    if not options.rebuild:
        details = "; ".join(reasons) or "none was built for this graph"
        raise EngineUnavailableError(
            f"no TensorRT engine of {path.name} fits this machine ({details}); build one with --rebuild"
        )
    rebuilt = build(path, _bundle_spec(path), settings, [device.capability], component=_graph_name(path))
    if options.cache is not None:
        key = _key(settings, rebuilt.entry["library"], rebuilt.entry["version"], device.capability)
        options.cache.write(f"{key} plan", rebuilt.data)
        options.cache.write(f"{key} entry", json.dumps(rebuilt.entry).encode())
    return rebuilt.data, rebuilt.entry


def _settings(path: Path, built: Sequence[PrebuiltEngine]) -> BuildOptions:
    """Build options of the bundle's engines, to rebuild with the same ones."""
    options: Any = next((entry["options"] for _, entry in built if "options" in entry), {})
    return BuildOptions.from_json(options, str(path))


def _cached(cache: Cache | None, settings: BuildOptions, device: Device) -> tuple[bytes, dict[str, Any]] | None:
    """Return the engine rebuilt earlier for this device, if the cache has one."""
    for library, version in device.libraries.items():
        key = _key(settings, library, version, device.capability)
        entry, data = (None, None) if cache is None else (cache.read(f"{key} entry"), cache.read(f"{key} plan"))
        if entry is not None and data is not None:
            return data, json.loads(entry)
    return None


def _key(settings: BuildOptions, library: str, version: str, capability: str) -> str:
    return f"{library} {version} {capability} {json.dumps(settings.to_json())}"


def _bundle_spec(path: Path) -> DenoiserSpec:
    """Read the spec of the graph's bundle, whose manifest was verified when the bundle was opened."""
    manifest = path.parent / MANIFEST
    if not manifest.is_file():
        raise InvalidInputError(
            f"{path}: only graphs of a bundle can be rebuilt; there is no {MANIFEST} next to this one"
        )
    return DenoiserSpec.from_json(read_json(manifest).get("spec"), f"{manifest}: spec")


def _graph_name(path: Path) -> str:
    """'denoiser.tensorrt.onnx' -> 'denoiser'."""
    return path.name.split(".", 1)[0]
