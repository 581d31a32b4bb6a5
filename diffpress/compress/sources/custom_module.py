"""Custom modules, `file.py:weights`: the file defines load(path) -> (torch.nn.Module, DenoiserSpec)."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch
from torch import nn

from diffpress.compress.checkpoint import RECORD, Checkpoint, Source
from diffpress.compress.models.widths import apply_widths_, widths_of
from diffpress.compress.sources.layout import load_weights_
from diffpress.compress.sources.record import history_and_scales, read_record
from diffpress.compress.sources.renamed_imports import refuse_old_imports
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


def load_custom_module(file: Path, weights: Path) -> Checkpoint:
    """Load a checkpoint through the `load` function of a user's file.

    Args:
        file: Python file that defines `load`.
        weights: Passed to `load`; or a checkpoint that was saved from such a module.

    Raises:
        InvalidInputError: A file is missing, `load` fails, or the weights contain NaN or infinite values.
    """
    if not file.is_file():
        raise InvalidInputError(f"{file}: no such file; a custom module is named as file.py:weights")
    if not weights.exists():
        raise InvalidInputError(f"{weights}: no such weights file for {file}")
    saved = weights.is_dir() and (weights / RECORD).is_file()
    record = read_record(weights) if saved else None
    original = next(iter(sorted(weights.glob("original*"))), weights) if saved else weights
    module, spec = _call_load(file, original)
    where = str(weights)
    for name, tensor in module.state_dict().items():
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidInputError(
                f"{original}: tensor '{name}' contains NaN or infinite values; the checkpoint is broken"
            )
    source = Source("custom", file=file, weights=original, original=widths_of(module))
    if record is not None:
        apply_widths_(module, record.get("widths", {}), where)
        load_weights_(module, [weights / "weights.safetensors"])
        spec = DenoiserSpec.from_json(record.get("spec"), f"{weights / RECORD}: spec")
    return Checkpoint(module.eval(), spec, source, *history_and_scales(record, weights))


def _call_load(file: Path, weights: Path) -> tuple[nn.Module, DenoiserSpec]:
    definition = importlib.util.spec_from_file_location(f"diffpress_custom_{file.stem}", file)
    if definition is None or definition.loader is None:
        raise InvalidInputError(f"{file}: cannot be imported")
    refuse_old_imports(file)
    code = importlib.util.module_from_spec(definition)
    try:
        definition.loader.exec_module(code)
        result = code.load(weights)
    except (Exception, SystemExit) as error:  # user code may raise anything
        raise InvalidInputError(f"{file}: load({weights}) failed: {type(error).__name__}: {error}") from error
    if not (
        isinstance(result, tuple)
        and len(result) == 2
        and isinstance(result[0], nn.Module)
        and isinstance(result[1], DenoiserSpec)
    ):
        raise InvalidInputError(f"{file}: load(path) must return (torch.nn.Module, DenoiserSpec)")
    return result[0].float(), result[1]
