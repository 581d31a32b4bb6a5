"""Hostile manifests and folders of bundles: each function changes a copy of an intact bundle.

A change of the manifest is sealed: whoever made the bundle also computed the hashes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from diffpress.runtime.bundle import MANIFEST, manifest_hash

ESCAPES = "\x1b]0;owned\x07\x1b[2J\r\nfake: \u202etxt\u2028<script>alert(1)</script>"
Change = Callable[[Path], object]


def entry(*path: str | int, value: Any) -> Change:
    """Replace one entry of the manifest."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        reseal(folder, manifest)

    return change


def reseal(folder: Path, manifest: dict[str, Any]) -> None:
    """Write a manifest with a hash that fits."""
    manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def text(content: str | bytes) -> Change:
    """Replace the manifest."""
    data = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / MANIFEST).write_bytes(data)


def sparse_manifest(folder: Path) -> None:
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(2**40)


def linked_manifest(target: str) -> Change:
    def change(folder: Path) -> None:
        (folder / MANIFEST).unlink()
        (folder / MANIFEST).symlink_to(target)

    return change


def fifo(name: str) -> Change:
    def change(folder: Path) -> None:
        (folder / name).unlink()
        os.mkfifo(folder / name)

    return change


def device_graph(folder: Path) -> None:
    (folder / "denoiser.onnx").unlink()
    (folder / "denoiser.onnx").symlink_to("/dev/zero")


def outside_file(name: str) -> Change:
    """List a file outside the folder, as a part of the bundle and as its denoiser."""

    def change(folder: Path) -> None:
        manifest = json.loads((folder / MANIFEST).read_text())
        manifest["files"][name] = manifest["files"]["denoiser.onnx"]
        manifest["graphs"]["denoiser"]["file"] = name
        (folder.parent / "denoiser.onnx").write_bytes((folder / "denoiser.onnx").read_bytes())
        reseal(folder, manifest)

    return change


def graph_of_another_format(folder: Path) -> None:
    manifest = json.loads((folder / MANIFEST).read_text())
    (folder / "denoiser.ort").write_bytes((folder / "denoiser.onnx").read_bytes())
    manifest["files"]["denoiser.ort"] = manifest["files"]["denoiser.onnx"]
    manifest["graphs"]["denoiser"]["file"] = "denoiser.ort"
    reseal(folder, manifest)


def text_conditioning(tokenizer: str) -> dict[str, Any]:
    """A conditioning whose tokenizer lies at another place."""
    encoder = {"graph": "denoiser", "tokenizer": tokenizer, "length": 4, "pad": 0, "lower": False}
    return {"kind": "text", "encoders": [encoder], "inputs": {"x": {"shape": [4], "rows": [["denoiser.x"]]}}}


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


# name -> change, and whether the bundle has to be refused
MANIFESTS: dict[str, tuple[Change, bool]] = {
    "JSON nested 100,000 deep": (text(nested(100_000)), True),
    "JSON nested 900 deep": (text(f'{{"format": 2, "x": {nested(900)}}}'), True),
    "an integer of a million digits": (text(f'{{"format": {"9" * 1_000_000}}}'), True),
    "a manifest of a terabyte": (sparse_manifest, True),
    "a manifest of UTF-16": (text('{"format": 2}'.encode("utf-16")), True),
    "a manifest of zeros": (text(bytes(4096)), True),
    "a manifest that links to itself": (linked_manifest(MANIFEST), True),
    "a manifest that links to a device": (linked_manifest("/dev/zero"), True),
    "a manifest that is a pipe": (fifo(MANIFEST), True),
    "a graph that is a pipe": (fifo("denoiser.onnx"), True),
    "a graph that links to a device": (device_graph, True),
    "a graph in the parent folder": (outside_file("../denoiser.onnx"), True),
    "a graph at an absolute path": (outside_file("/etc/passwd"), True),
    "a graph of another format": (graph_of_another_format, True),
    "a file whose name has a zero byte": (entry("files", "a\0b", value={"bytes": 1, "sha256": ""}), True),
    "a file whose name is a lone surrogate": (entry("files", "\ud800", value={"bytes": 1, "sha256": ""}), True),
    "a file whose name is 10,000 characters": (entry("files", "x" * 10_000, value={"bytes": 1, "sha256": ""}), True),
    "a file whose name has escape sequences": (entry("files", ESCAPES, value={"bytes": 1, "sha256": ""}), True),
    "a name with escape sequences": (entry("name", value=ESCAPES), False),
    "a family with escape sequences": (entry("family", value=ESCAPES), False),
    "a stage with escape sequences": (entry("history", value=[{"stage": ESCAPES}]), False),
    "a solver with escape sequences": (entry("spec", "plan", "solver", value=ESCAPES), False),
    "a required feature with escape sequences": (entry("requires", value=[ESCAPES]), True),
    "an engine with escape sequences": (
        entry("engines", value=[{"engine": ESCAPES, "graph": ESCAPES, "version": ESCAPES}]),
        False,
    ),
    "a failure with escape sequences": (
        entry("parity_failures", value=[{"engine": "onnxruntime", "target": True, "message": ESCAPES}]),
        False,
    ),
    "an unknown prediction of a million characters": (entry("spec", "prediction", value="x" * 1_000_000), True),
    "a tokenizer outside the folder": (entry("spec", "conditioning", value=text_conditioning("../../etc")), True),
    "a tokenizer that is not listed": (entry("spec", "conditioning", value=text_conditioning("tokenizer")), True),
    "an engine outside the folder": (
        entry("engines", value=[{"engine": "tensorrt", "graph": "denoiser.onnx", "file": "../x.engine"}]),
        True,
    ),
    "samples of 2**62 values": (entry("spec", "sample_shape", value=[1, 2**31, 2**31]), True),
    "samples of 2**31 values": (entry("spec", "sample_shape", value=[1, 2**16, 2**15]), True),
    "samples of -1 values": (entry("spec", "sample_shape", value=[1, -8, 8]), True),
    "a noise schedule of NaN": (entry("spec", "schedule", value={"alphas": [float("nan")], "sigmas": [1.0]}), True),
    "a latent scale of infinity": (entry("spec", "latent_scale", value=float("inf")), True),
    "timesteps of 1e308": (entry("spec", "plan", "timesteps", value=[1e308, 0.0]), True),
    "a million timesteps": (entry("spec", "plan", "timesteps", value=list(range(1_000_000, 0, -1))), True),
    "sizes of 2**62": (entry("spec", "size_multiple", value=2**62), False),
    "files as a list": (entry("files", value=[]), True),
    "graphs as a string": (entry("graphs", value="denoiser"), True),
    "a graph as a list": (entry("graphs", "denoiser", value=["denoiser.onnx"]), True),
    "inputs of a wrong type": (entry("graphs", "denoiser", "inputs", value=[1]), True),
    "a history of numbers": (entry("history", value=[1, 2]), True),
    "parity failures of a wrong type": (entry("parity_failures", value=7), True),
    "no spec": (entry("spec", value=None), True),
}
