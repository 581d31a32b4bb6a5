"""What a checkpoint or bundle is, read from its configs and file headers alone: no weight is loaded."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

from diffpress.compress.builtin import built_in_path
from diffpress.runtime.bundle import find_bundle, load_bundle
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec
from diffpress.runtime.trust.signature import refuse_unsigned, signer

DTYPE_NAMES = {"F32": "fp32", "F16": "fp16", "BF16": "bf16"}  # safetensors' names


def describe(path: str | Path, public_key: str | Path | None = None) -> dict[str, Any]:
    """Return family, precision, sizes, sampling plan, history and engines of a checkpoint folder or bundle.

    Raises InvalidInputError for a path that is neither, or no bundle that was signed with the key, if one is required.
    """
    folder = built_in_path(path)
    bundle = find_bundle(folder)
    if bundle is not None:
        return _describe_bundle(bundle, public_key)
    refuse_unsigned(str(folder), public_key)
    if folder.is_dir():
        return _describe_checkpoint(folder)
    raise InvalidInputError(f"{folder}: no such folder; give a bundle or a checkpoint in diffusers' layout")


def _describe_bundle(folder: Path, public_key: str | Path | None) -> dict[str, Any]:
    bundle = load_bundle(folder, public_key)
    key = signer(folder)
    manifest, denoiser = bundle.manifest, bundle.manifest["graphs"]["denoiser"]
    return {
        "kind": "bundle",
        "path": str(folder),
        "format": manifest["format"],
        "name": manifest.get("name"),
        "family": manifest.get("family") if manifest.get("family") != "custom" else "custom module",
        "precision": denoiser.get("precision"),
        "parameters": denoiser.get("parameters"),
        "size_mib": round(sum(entry["bytes"] for entry in manifest["files"].values()) / 2**20, 2),
        "components": [
            _in_format(name, entry.get("precision")) for name, entry in manifest["graphs"].items() if name != "denoiser"
        ],
        **_describe_sampling(bundle.spec),
        "history": [record["stage"] for record in manifest.get("history", [])],
        "engines": [
            {key: entry.get(key) for key in ("engine", "version", "integer_mac_share") if key in entry}
            for entry in manifest["engines"]
        ],
        "signature": key and {"key": key, "checked": public_key is not None},
    }


def _describe_checkpoint(folder: Path) -> dict[str, Any]:
    from diffpress.compress.sources.diffusers_folder import spec_of_folder
    from diffpress.compress.sources.layout import DECODERS, read_layout
    from diffpress.compress.sources.record import read_record
    from diffpress.compress.sources.weights import weight_files

    record = read_record(folder) or {}
    if record.get("kind") == "custom":
        files, family, components = [folder / "weights.safetensors"], "custom module", []
        spec = DenoiserSpec.from_json(record.get("spec"), f"{folder}: spec")
    else:
        layout = read_layout(folder)
        files, family = weight_files(layout.denoiser), layout.kind
        components = sorted(name for name in layout.configs)
        spec = spec_of_folder(folder)
    parameters = _parameters_by_dtype(files)
    quantization = record.get("quantization") or {}
    scales = {name: entry["format"] for name, entry in (record.get("components") or {}).items()}
    formats = scales | dict.fromkeys(DECODERS, scales.get("vae_decoder"))  # the folders of a decoder have other names
    return {
        "kind": "checkpoint",
        "path": str(folder),
        "format": record.get("format"),
        "name": folder.resolve().name,
        "family": family,
        "precision": quantization.get("format") or ", ".join(sorted(parameters)),
        "parameters": sum(parameters.values()),
        "size_mib": round(sum(file.stat().st_size for file in files) / 2**20, 2),
        "components": [_in_format(name, formats.get(name)) for name in components],
        **_describe_sampling(spec),
        "history": [entry["stage"] for entry in record.get("history", [])],
        "engines": [],
        "signature": None,
    }


def _in_format(component: str, precision: str | None) -> str:
    """Return the component's name, with its format if that is not fp32."""
    return component if precision in (None, "fp32") else f"{component} ({precision})"


def _parameters_by_dtype(files: list[Path]) -> Counter[str]:
    from diffpress.compress.sources.weights import tensor_types

    counts: Counter[str] = Counter()
    for file in files:
        for dtype, shape in tensor_types(file).values():
            counts[DTYPE_NAMES.get(dtype, dtype)] += prod(shape)
    return counts


def _describe_sampling(spec: DenoiserSpec) -> dict[str, Any]:
    plan, conditioning = spec.plan, spec.conditioning
    return {
        "prediction": spec.prediction,
        "sample_shape": list(spec.sample_shape),
        "image_size": list(spec.image_size) if len(spec.sample_shape) == 3 else None,
        "conditioning": conditioning.kind if conditioning.kind != "class" else f"{conditioning.classes} classes",
        "plan": {
            "solver": plan.solver,
            "steps": plan.steps,
            "guidance": plan.guidance,
            "output_corrections": bool(plan.output_corrections),
            "step_cache": None
            if plan.cache is None
            else {
                "kind": plan.cache.kind,
                "order": plan.cache.order,
                "cut": plan.cache.cut,
                "steps": plan.cache.counts,
            },
        },
        "distilled": spec.distilled or None,
    }
