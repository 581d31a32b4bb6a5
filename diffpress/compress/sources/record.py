"""Read diffpress.json, and the history and quantization scales of a saved checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from diffpress.compress.checkpoint import FORMAT, RECORD, TENSOR_KINDS, Quantization, Record
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.format_1 import upgraded_spec, upgraded_tensor_name
from diffpress.runtime.io.files import read_json


def history_and_scales(record: dict[str, Any] | None, folder: Path) -> tuple[tuple[Record, ...], Quantization | None]:
    """Return the history and the quantization of a checkpoint folder; () and None without a record.

    Raises:
        InvalidInputError: The history or a scale is invalid.
    """
    if record is None:
        return (), None
    try:
        history = tuple(Record(**entry) for entry in record.get("history", []))
    except TypeError as error:
        raise InvalidInputError(f"{folder / RECORD}: invalid history ({error})") from error
    if not record.get("quantization"):
        return history, None
    file = folder / "quantization.safetensors"
    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_tensor(name) for name in tensors.keys()}
        if record.get("format") == 1:
            found = {upgraded_tensor_name(name): value for name, value in found.items()}
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file}: the scales cannot be read ({error}); quantize again") from error
    for name, value in found.items():
        signed = name.startswith("svdquant.")
        if not torch.isfinite(value).all() or (not signed and (value <= 0).any()):
            raise InvalidInputError(f"{file}: scale '{name}' is zero, negative or not finite; quantize again")
        if name.partition(".")[0] not in TENSOR_KINDS:
            raise InvalidInputError(f"{file}: unknown scale '{name}'; quantize again")
    facts = record["quantization"]
    kinds = {kind: _of_kind(found, kind) for kind in TENSOR_KINDS}
    return history, Quantization(str(facts["format"]), formats=dict(facts.get("formats", {})), **kinds)


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
