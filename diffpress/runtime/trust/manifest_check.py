"""Checks of a manifest: every file that sampling reads is listed, lies in the bundle and has its sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.trust.graph_files import check_graph_files

TOKENIZER = "tokenizer.json"
# lists of the manifest and what each of their entries has
RECORDS: dict[str, dict[str, type]] = {
    "history": {"stage": str},
    "parity_failures": {"engine": str, "target": bool, "message": str},
}
DERIVED = ("cached", "controlled", "lora")  # graphs that are listed in the entry of the graph that they were made from
# entries of a graph that may be left out, each with a value of its type
GRAPH_ENTRIES: dict[str, Any] = {"precision": "", "bytes": 0, "inputs": {}, "outputs": {}, "features": []}


def sha256(path: Path) -> str:
    """Return the sha256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_files(manifest: dict[str, Any], file: Path) -> None:
    """Check the entries of graphs, engines and files of the manifest in `file`, and every file that it lists.

    Raises:
        InvalidInputError: An entry is malformed or names a file that is not listed, or a file is missing, damaged,
            outside the folder, or refers to one that is not listed.
    """
    listed, graphs = manifest.get("files"), manifest.get("graphs")
    if not isinstance(listed, dict) or not isinstance(graphs, dict) or not isinstance(graphs.get("denoiser"), dict):
        raise InvalidInputError(f"{file}: no list of files or no denoiser graph; export the bundle again")
    used = []
    for name, graph in graphs.items():
        entries = list(_entries(graph))
        if not all(isinstance(entry, dict) and str(entry.get("file")) in listed for entry in entries):
            raise InvalidInputError(f"{file}: the {name}'s file is not among the listed files; export the bundle again")
        used += [str(entry["file"]) for entry in entries]
    engines = manifest.get("engines")
    if not isinstance(engines, list) or not all(_is_engine(entry, listed) for entry in engines):
        raise InvalidInputError(
            f"{file}: an entry of 'engines' has no engine, no graph or a file that is not listed; "
            "export the bundle again"
        )
    for name, entry in listed.items():
        _check_file(file, name, entry)
    for name in dict.fromkeys(used):
        check_graph_files(file.parent / name, file.parent, listed)


def check_records(manifest: dict[str, Any], file: Path) -> None:
    """Check the entries of the manifest that describe the bundle; raises InvalidInputError for one of a wrong type."""
    for name, fields in RECORDS.items():
        entries = manifest.get(name, [])
        if not isinstance(entries, list) or not all(_has(entry, fields) for entry in entries):
            raise InvalidInputError(
                f"{file}: an entry of {name!r} has none of {', '.join(fields)}, or of a wrong type; export it again"
            )
    for name, graph in manifest["graphs"].items():
        for entry in _entries(graph):
            if not all(isinstance(entry.get(key, default), type(default)) for key, default in GRAPH_ENTRIES.items()):
                raise InvalidInputError(
                    f"{file}: an entry of the graph {name!r} has a wrong type; export the bundle again"
                )


def _has(entry: Any, fields: dict[str, type]) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(name), kind) for name, kind in fields.items())


def check_tokenizers(spec: DenoiserSpec, manifest: dict[str, Any], file: Path) -> None:
    """Check that the tokenizers that the spec names are among the listed files; raises InvalidInputError otherwise."""
    for encoder in spec.conditioning.encoders:
        name = f"{encoder.tokenizer}/{TOKENIZER}"
        if name not in manifest["files"]:
            raise InvalidInputError(f"{file}: {name!r} is not among the listed files; export the bundle again")


def _entries(graph: Any) -> Iterator[Any]:
    """Yield the entries with a `file` of a graph: its own, those of its variants and of the graphs made from them."""
    variants = graph.get("variants", {}) if isinstance(graph, dict) else None
    for entry in (graph, *variants.values()) if isinstance(variants, dict) else (None,):
        yield from _with_derived(entry)


def _with_derived(entry: Any) -> Iterator[Any]:
    """Yield an entry and those of the graphs made from its own: that with slots may have a cached graph."""
    yield entry
    if isinstance(entry, dict):
        for name in DERIVED:
            if name in entry:
                yield from _with_derived(entry[name])


def _is_engine(entry: Any, listed: dict[str, Any]) -> bool:
    if not isinstance(entry, dict) or not all(isinstance(entry.get(key), str) for key in ("engine", "graph")):
        return False
    return "file" not in entry or str(entry["file"]) in listed


def _check_file(file: Path, name: str, entry: Any) -> None:
    path = file.parent / name
    # by its name: in a hub cache the files are links to blobs outside the folder
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InvalidInputError(f"{file}: '{name}' points outside the bundle")
    if not isinstance(entry, dict) or not {"bytes", "sha256"} <= entry.keys():
        raise InvalidInputError(f"{file}: '{name}' has no size and sha256; export the bundle again")
    try:
        there = path.is_file()
        intact = there and path.stat().st_size == entry["bytes"] and sha256(path) == entry["sha256"]
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        raise InvalidInputError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not there:
        raise InvalidInputError(f"{path}: listed in the manifest but missing; copy the bundle again")
    if not intact:
        raise InvalidInputError(
            f"{path}: does not match its sha256 in the manifest, so it is damaged; copy the bundle again"
        )
