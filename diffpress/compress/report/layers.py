"""Precision map: every layer of the denoiser with its number format, its size, and in what each engine ran it.

Names and shapes are those of the checkpoint's weights, formats those of its record, and what an engine ran is in the
bundle's manifest. The sensitivity is the output SQNR with only this layer quantized, where a stage measured it
(compress/quantization/algorithms/mixed_precision.py).
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from diffpress.compress.report.lineage import RECORD
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

INTEGER, FLOAT = "integer", "float"


def layers_of(checkpoint: Path, manifest: dict[str, Any], history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return {layer, format, weights, sqnr_db, executed: {engine: what}} of every layer, in the order of their names.

    Args:
        checkpoint: Folder of the result's checkpoint; without it only the quantized layers are known.
        manifest: The bundle's manifest.
        history: Its stages.

    Raises:
        InvalidInputError: The checkpoint's weights or record cannot be read.
    """
    graph = manifest["graphs"]["denoiser"]
    quantized = [*graph.get("quantized_layers", ()), *graph.get("weight_only_layers", ())]
    record = read_json(checkpoint / RECORD) if (checkpoint / RECORD).is_file() else {}
    scales = record.get("quantization") or {}
    weights = _weights(checkpoint, record)
    measured: dict[str, Any] = {}
    for entry in history:
        measured |= entry["changed"].get("mixed", {}).get("places", {})
    rows = []
    for name in sorted({*weights, *quantized}, key=_natural):
        is_quantized = name in quantized
        kind = scales.get("formats", {}).get(name, scales.get("format")) if is_quantized else None
        rows.append(
            {
                "layer": name,
                "format": kind or ("quantized" if is_quantized else FLOAT),
                "weights": weights.get(name),
                "sqnr_db": measured.get(name, {}).get("sqnr_db"),
                "executed": _executed(name, manifest, name in graph.get("quantized_layers", ())),
            }
        )
    return rows


def _executed(layer: str, manifest: dict[str, Any], is_promised: bool) -> dict[str, str]:
    """Return engine -> 'integer', 'float', or 'float: why' for a layer that fell back."""
    found = {}
    for entry in manifest["engines"]:
        if entry.get("integer_mac_share") is None:
            continue
        reasons = {fallback["layer"]: fallback["reason"] for fallback in entry["fallbacks"]}
        # an engine that runs a float graph promised nothing
        runs = INTEGER if is_promised and entry["integer_mac_share"] > 0 else FLOAT
        found[entry["engine"]] = f"{FLOAT}: {reasons[layer]}" if layer in reasons else runs
    return found


def _weights(checkpoint: Path, record: dict[str, Any]) -> dict[str, int]:
    """Return layer -> number of its weights, of all layers with a weight of two or more dimensions."""
    files = [checkpoint / str(record.get("folder")) / "diffusion_pytorch_model.safetensors"]
    files.append(checkpoint / "weights.safetensors")
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    try:
        with safe_open(file, framework="numpy") as tensors:
            shapes = {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}
    except (OSError, SafetensorError) as error:
        raise InvalidInputError(f"{file}: not readable as safetensors ({error}); run compress again") from error
    suffix = ".weight"
    return {
        name.removesuffix(suffix): math.prod(shape)
        for name, shape in shapes.items()
        if name.endswith(suffix) and len(shape) >= 2
    }


def _natural(name: str) -> list[tuple[int, str]]:
    """Sort key by which block 2 comes before block 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
