"""Read diffpress.json, and the history and quantization scales of a saved checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffpress.compress.checkpoint import FORMAT, RECORD, SCALES, TENSOR_KINDS, Quantization, Record
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.format_1 import upgraded_spec, upgraded_tensor_name
from diffpress.runtime.io.files import read_json


def history_and_scales(
    record: dict[str, Any] | None, folder: Path
) -> tuple[tuple[Record, ...], Quantization | None, dict[str, Quantization]]:
    """Return the history, the denoiser's scales and those of other components; (), None and {} without a record.

    Raises:
        InvalidInputError: The history or a scale is invalid.
    """
    if record is None:
        return (), None, {}
    try:
        history = tuple(Record(**entry) for entry in record.get("history", []))
    except TypeError as error:
        raise InvalidInputError(f"{folder / RECORD}: invalid history ({error})") from error
    upgrade = record.get("format") == 1
    facts, others = record.get("quantization"), record.get("components") or {}
    own = _scales(facts, folder / f"{SCALES}.safetensors", upgrade) if facts else None
    components = {
        name: _scales(entry, folder / f"{SCALES}.{name}.safetensors", upgrade) for name, entry in others.items()
    }
    return history, own, components


def _scales(facts: dict[str, Any], file: Path, upgrade: bool) -> Quantization:
    """Read the scales in `file`; `upgrade` those of format 1."""
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}
        if upgrade:
            found = {upgraded_tensor_name(name): value for name, value in found.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file}: the scales cannot be read ({error}); quantize again") from error
    for name, value in found.items():
        signed = name.startswith("svdquant.")
        if not torch.isfinite(value).all() or (not signed and (value <= 0).any()):
            raise InvalidInputError(f"{file}: scale '{name}' is zero, negative or not finite; quantize again")
        if name.partition(".")[0] not in TENSOR_KINDS:
            raise InvalidInputError(f"{file}: unknown scale '{name}'; quantize again")
    kinds = {kind: _of_kind(found, kind) for kind in TENSOR_KINDS}
    return Quantization(str(facts["format"]), formats=dict(facts.get("formats", {})), **kinds)


def _of_kind(tensors: dict[str, torch.Tensor], kind: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(f"{kind}."): value for name, value in tensors.items() if name.startswith(f"{kind}.")}


def read_record(folder: Path) -> dict[str, Any] | None:
    """Read diffpress.json, upgrading older ones; None if the folder has none.

    Raises:
        InvalidInputError: The file is not readable or has an unknown format.
    """
    file = folder / RECORD
    if not file.is_file():
        return None
    record = read_json(file, hint="")
    if record.get("format", FORMAT) not in (1, FORMAT):
        raise InvalidInputError(
            f"{file}: checkpoint format {record['format']!r}, this diffpress reads 1 and {FORMAT}; install a newer one"
        )
    if record.get("format") == 1 and "spec" in record:
        record["spec"] = upgraded_spec(record["spec"])
    weight = _noted_guidance(record.get("history"))
    if weight is not None and isinstance(record.get("spec"), dict):
        # before the spec had this entry, the history alone held it
        record["spec"] = {"baked_in_guidance": weight} | record["spec"]
    return record


def _noted_guidance(history: Any) -> Any:
    """Return the guidance weight that the last record with one notes; None if there is none."""
    records = history if isinstance(history, list) else []
    changes = [entry.get("changed") for entry in records if isinstance(entry, dict)]
    weights = [changed["guidance"] for changed in changes if isinstance(changed, dict) and "guidance" in changed]
    return weights[-1] if weights else None
