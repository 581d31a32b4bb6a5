"""A bundle: one folder with everything a deployment needs, described and sealed by its manifest.json.

    manifest.json                       format, requires, name, spec (with the sampling plan), graphs, engines, history,
                                        metrics, and the size and sha256 of every file
    manifest.sig                        signature of the manifest, if its owner signed it (trust/signature.py)
    denoiser.onnx                       the portable graph
    denoiser.*.onnx                     variants of that network for single engines; the manifest maps engines to them
    *.lora.onnx                         forms of these graphs with slots for LoRAs (runtime/lora/slots.py)
    text_encoder*.onnx, tokenizer*/, vae_decoder.onnx       if the model has them
    engines/...                         files built ahead of time for one engine and device
    unet/, ..., model_index.json        the same graphs in the layout that optimum's ONNX pipelines read

`hash` identifies the bundle: it is the sha256 of the canonical manifest without that entry. A manifest contains no
timestamps, so the same inputs give the same hash, except for TensorRT engines, whose bytes differ with every build.
`load_bundle` refuses a bundle whose files do not match its manifest.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.format_1 import upgraded_spec
from diffpress.runtime.io.files import parsed_json, read_json_bytes
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.trust.manifest_check import check_files, check_records, check_tokenizers
from diffpress.runtime.trust.manifest_check import sha256 as sha256
from diffpress.runtime.trust.signature import SIGNATURE, check_signature

FORMAT = 2
MANIFEST = "manifest.json"

# features beyond format 2 that this runtime supports; a bundle lists those it needs under `requires`
FEATURES = frozenset({"sample_rank", "tensor_conditioning", "decoder", "inpainting", "step_cache"})


def required_features(spec: DenoiserSpec, graphs: Collection[str]) -> list[str]:
    """Return the features that a bundle with this spec and these graphs needs, sorted."""
    needed = {
        "sample_rank": len(spec.sample_shape) != 3,
        "tensor_conditioning": bool(spec.conditioning.tensors),
        "inpainting": bool(spec.conditioning.inpainting),
        "decoder": "vae_decoder" in graphs and spec.latent_factor == 1,  # format 2 alone would not run it
        "step_cache": spec.plan.cache is not None,
    }
    return sorted(name for name, is_needed in needed.items() if is_needed)


class PrebuiltEngine(NamedTuple):
    """A file built ahead of time for one engine, with its entry in the manifest's `engines`."""

    file: Path
    entry: dict[str, Any]


@dataclass(frozen=True)
class Bundle:
    """A verified bundle: its folder, its spec and its parsed manifest.

    Examples:
        >>> import diffpress as dp
        >>> opened = dp.load_bundle(bundle)
        >>> isinstance(opened, dp.Bundle), opened.spec.plan.steps
        (True, 8)
    """

    path: Path
    spec: DenoiserSpec
    manifest: dict[str, Any]

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, {self.spec.plan.steps} steps of {self.spec.plan.solver})"

    @property
    def is_latent(self) -> bool:
        """Whether the denoiser's samples are latents of an autoencoder."""
        return self.spec.latent_factor > 1 or "decoder" in self.manifest.get("requires", ())

    @property
    def denoiser(self) -> Path:
        """The denoiser's ONNX file."""
        return self.graph("denoiser")

    def graph(self, name: str, engine: str | None = None) -> Path:
        """Return the ONNX file of a graph.

        Args:
            name: 'denoiser', or 'text_encoder', 'vae_decoder' and so on if the model has them.
            engine: Return the variant for this engine if there is one.

        Raises:
            InvalidInputError: The bundle has no such graph.
        """
        graphs = self.manifest["graphs"]
        if name not in graphs:
            raise InvalidInputError(
                f"{self.path}: has no {name} (it has {', '.join(graphs)}); export the whole pipeline"
            )
        entry = graphs[name]
        return self.path / str(entry.get("variants", {}).get(engine, entry)["file"])

    def slots(self, name: str = "denoiser", engine: str | None = None) -> dict[str, Any] | None:
        """Return the manifest's entry of a graph's form with slots for LoRAs, or None if it has none."""
        graph = self.manifest["graphs"].get(name, {})
        entry: dict[str, Any] | None = graph.get("variants", {}).get(engine, graph).get("lora")
        return entry

    def lora_graph(self, name: str, engine: str | None = None) -> Path:
        """Return the ONNX file of a graph in its form with slots for LoRAs; the arguments are those of `graph`.

        Raises:
            InvalidInputError: The bundle has no slots.
        """
        entry = self.slots(name, engine)
        if entry is None:
            raise InvalidInputError(
                f"{self.path}: its {name} has no slots for LoRAs; export the bundle again with --lora-slots 1 or more"
            )
        return self.path / str(entry["file"])

    def cached_graph(self, engine: str, lora: bool = False) -> tuple[Path, tuple[str, ...]]:
        """Return the ONNX file of the cached graph that belongs to this engine's graph, and its features' names.

        `lora` returns that of the graph with slots for LoRAs.

        Raises:
            InvalidInputError: The bundle has none.
        """
        graph = self.manifest["graphs"]["denoiser"]
        graph = graph.get("variants", {}).get(engine, graph)
        entry = (graph.get("lora", {}) if lora else graph).get("cached")
        if entry is None:
            raise InvalidInputError(
                f"{self.path}: the plan's step cache needs a cached graph, and the bundle has none for {engine}; use "
                "another engine, or export it again"
            )
        return self.path / str(entry["file"]), tuple(map(str, entry["features"]))

    @property
    def control_networks(self) -> tuple[str, ...]:
        """Names of the graphs of ControlNets, in the order of their images."""
        return tuple(self.manifest["graphs"]["denoiser"].get("control_networks", ()))

    def controlled_graph(self, engine: str) -> Path:
        """Return the ONNX file of this engine's denoiser with residuals of control networks as inputs.

        Raises:
            InvalidInputError: The bundle has none.
        """
        graph = self.manifest["graphs"]["denoiser"]
        entry = graph.get("variants", {}).get(engine, graph).get("controlled")
        if entry is None:
            raise InvalidInputError(
                f"{self.path}: has no graph for control images in {engine}; use another engine, or export it again "
                "with --controlnet"
            )
        return self.path / str(entry["file"])

    def prebuilt_engines(self, graph: str, engine: str) -> tuple[PrebuiltEngine, ...]:
        """Return the files built ahead of time for this engine from the variant of the graph that it uses."""
        return self.engines_of(self.graph(graph, engine), engine)

    def engines_of(self, file: Path, engine: str) -> tuple[PrebuiltEngine, ...]:
        """Return the files built ahead of time for this engine from one of the bundle's ONNX files."""
        source = file.relative_to(self.path).as_posix()
        return tuple(
            PrebuiltEngine(self.path / entry["file"], entry)
            for entry in self.manifest["engines"]
            if entry["engine"] == engine and "file" in entry and entry["graph"] == source
        )

    def spec_for(self, engine: str, spec: DenoiserSpec | None = None) -> DenoiserSpec:
        """Return the spec for this engine's graph: without output corrections if it uses an fp32 variant.

        `spec` defaults to the bundle's own; pass one to use another plan or size.
        """
        spec = spec or self.spec
        variant = self.manifest["graphs"]["denoiser"].get("variants", {}).get(engine)
        if variant is None or variant["precision"] != "fp32":
            return spec
        return spec.with_plan(spec.plan.without_corrections)

    @property
    def hash(self) -> str:
        """The sha256 that identifies the bundle."""
        return str(self.manifest["hash"])


def manifest_hash(manifest: dict[str, Any]) -> str:
    """Return the sha256 of the canonical manifest without its `hash` entry."""
    content = {key: value for key, value in manifest.items() if key != "hash"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def seal(folder: Path, content: dict[str, Any]) -> dict[str, Any]:
    """Write the manifest from `content` plus the size and sha256 of every file, and return it.

    `folder` is expected to be temporary and renamed afterwards, so that no incomplete bundle is ever visible.
    """
    files = {
        path.relative_to(folder).as_posix(): {"sha256": sha256(path), "bytes": path.stat().st_size}
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in (MANIFEST, SIGNATURE)
    }
    manifest = {"format": FORMAT, "requires": [], **content, "files": files}
    manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
    return manifest


def find_bundle(path: str | Path) -> Path | None:
    """Return the folder of the bundle at a path: the path itself, or `bundle` in the folder of a compress run."""
    folder = Path(path)
    return next((place for place in (folder, folder / "bundle") if (place / MANIFEST).is_file()), None)


def load_bundle(path: str | Path, public_key: str | Path | None = None) -> Bundle:
    """Open a bundle, or that of a compress run, and verify every file against its manifest.

    Args:
        path: The bundle's folder, or that of a compress run.
        public_key: PEM file of the Ed25519 key that the bundle has to be signed with; None requires no signature.

    Raises:
        InvalidInputError: The folder is no bundle, its format is unknown, a file is missing, damaged or changed, or
            the required signature is missing or of another key.
        MissingDependencyError: A signature is required, and `cryptography` is not installed.

    Examples:
        >>> import diffpress as dp
        >>> dp.load_bundle(bundle).spec.prediction
        'v'
    """
    folder = find_bundle(path)
    if folder is None:
        raise InvalidInputError(
            f"{path}: not a bundle, it has no {MANIFEST} (make one with 'diffpress export' or 'diffpress compress')"
        )
    file = folder / MANIFEST
    content = read_json_bytes(file, hint="export the bundle again")
    if public_key is not None:
        check_signature(file, content, public_key)  # before anything of the bundle is parsed
    manifest = parsed_json(content, file, hint="export the bundle again")
    if not isinstance(manifest, dict) or manifest.get("format") not in (1, FORMAT):
        found = manifest.get("format") if isinstance(manifest, dict) else type(manifest).__name__
        raise InvalidInputError(
            f"{file}: bundle format {found!r}, but this diffpress reads 1 and {FORMAT}; install a newer diffpress or "
            "export the bundle again"
        )
    if manifest.get("hash") != manifest_hash(manifest):
        raise InvalidInputError(
            f"{file}: does not match its own hash, so it was changed after export; export the bundle again"
        )
    check_files(manifest, file)
    check_records(manifest, file)
    _check_requires(manifest, file)
    if manifest["format"] == 1:
        manifest = {**manifest, "spec": upgraded_spec(manifest.get("spec"))}
    spec = DenoiserSpec.from_json(manifest.get("spec"), f"{file}: spec")
    check_tokenizers(spec, manifest, file)
    return Bundle(folder, spec, manifest)


def _check_requires(manifest: dict[str, Any], file: Path) -> None:
    """Refuse a bundle that needs a feature this runtime does not support, naming the feature."""
    requires = manifest.get("requires", [])
    unknown = sorted({str(name) for name in requires} - FEATURES) if isinstance(requires, list) else ["?"]
    if unknown:
        raise InvalidInputError(
            f"{file}: requires {', '.join(unknown)}, which this diffpress does not support; install a newer diffpress"
        )
