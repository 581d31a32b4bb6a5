"""Read diffpress.json: the shapes, the history and the quantization scales of a saved checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffpress.compress.checkpoint import FORMAT, RECORD, SCALES, TENSOR_KINDS, Quantization, Record
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.kept_indices import cut_buffers_, kept_from_json
from diffpress.compress.models.low_rank_layers import restore_low_rank_layers_
from diffpress.compress.models.removed_blocks import restore_removed_blocks_
from diffpress.compress.models.widths import apply_widths_
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.format_1 import upgraded_spec, upgraded_tensor_name
from diffpress.runtime.io.files import read_json


def resize_(model: nn.Module, record: dict[str, Any] | None, folder: Path) -> None:
    """Give a freshly built, unpruned `model` the removed blocks, ranks and widths that diffpress.json lists.

    Resized parameters are new and uninitialized. Without a record, the model stays as it is.

    Raises:
        InvalidInputError: The record does not match the model.
    """
    if record is None:
        return
    where = str(folder / RECORD)
    restore_removed_blocks_(model, record.get("removed_blocks", {}), where)
    restore_low_rank_layers_(model, record.get("low_rank_layers", {}), where)
    apply_widths_(model, record.get("widths", {}), where)
    cut_buffers_(model, record.get("kept_indices"))
    adapter_for(model).refresh_(model)


def recorded_fields(record: dict[str, Any] | None, folder: Path, model: nn.Module) -> dict[str, Any]:
    """Return the fields of a Checkpoint besides its model, spec and source; {} without a record.

    Args:
        record: Content of diffpress.json.
        folder: The checkpoint's folder.
        model: The model, with the recorded widths.

    Raises:
        InvalidInputError: The history, a scale, or what belongs to a layer is invalid.
    """
    if record is None:
        return {}
    where = str(folder / RECORD)
    try:
        history = tuple(Record(**entry) for entry in record.get("history", []))
    except TypeError as error:
        raise InvalidInputError(f"{where}: invalid history ({error})") from error
    upgrade = record.get("format") == 1
    facts, others = record.get("quantization"), record.get("components") or {}
    return {
        "history": history,
        "quantization": _scales(facts, folder / f"{SCALES}.safetensors", upgrade) if facts else None,
        "component_quantization": {
            name: _scales(entry, folder / f"{SCALES}.{name}.safetensors", upgrade) for name, entry in others.items()
        },
        "kept_indices": kept_from_json(record.get("kept_indices", {}), model, where),
        "sparse_layers": _sparse_layers(record.get("sparse_layers", []), model, where),
    }


def _sparse_layers(names: Any, model: nn.Module, where: str) -> tuple[str, ...]:
    modules = dict(model.named_modules())
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise InvalidInputError(f"{where}: sparse_layers must be a list of layers")
    unknown = next((name for name in names if getattr(modules.get(name), "weight", None) is None), None)
    if unknown is not None:
        raise InvalidInputError(f"{where}: sparse_layers names '{unknown}', which is no layer of this model")
    return tuple(names)


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
