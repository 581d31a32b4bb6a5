"""Custom modules, `file.py:weights`: the file defines `load`, which returns a module, its spec and maybe a decoder.

load(path) -> (torch.nn.Module, DenoiserSpec)                      models of pixels, points, sequences, latents, ...
load(path) -> (torch.nn.Module, DenoiserSpec, torch.nn.Module)     with decoder(latents [N, ...]) -> images [N, ...]
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from diffpress.compress.checkpoint import RECORD, Checkpoint, Source
from diffpress.compress.models.widths import widths_of
from diffpress.compress.sources.module_check import check_decoder, check_denoiser
from diffpress.compress.sources.record import read_record, recorded_fields, resize_
from diffpress.compress.sources.renamed_imports import refuse_old_imports
from diffpress.compress.sources.terms import read_terms, stated_terms
from diffpress.compress.sources.user_file import neighbours_importable, run_file, user_errors
from diffpress.compress.sources.weights import header_metadata, load_weights_
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec


def load_custom_module(file: Path, weights: Path) -> Checkpoint:
    """Load a checkpoint through the `load` function of a user's file.

    Args:
        file: Python file that defines `load`.
        weights: Passed to `load`; or a checkpoint that was saved from such a module.

    Raises:
        InvalidInputError: A file is missing, `load` fails or returns something else, the weights contain NaN or
            infinite values, or the module does not do what its spec says.
    """
    if not file.is_file():
        raise InvalidInputError(f"{file}: no such file; a custom module is named as file.py:weights")
    if not weights.exists():
        raise InvalidInputError(f"{weights}: no such weights file for {file}")
    saved = weights.is_dir() and (weights / RECORD).is_file()
    record = read_record(weights) if saved else None
    original = next(iter(sorted(weights.glob("original*"))), weights) if saved else weights
    module, spec, decoder = _call_load(file, original)
    for part in (module, decoder):
        if part is not None:
            _check_weights(part, original)
    if decoder is not None:
        check_decoder(decoder, spec, file)
    terms = read_terms(weights) if weights.is_dir() else {}
    if weights.suffix == ".safetensors":
        terms = stated_terms(header_metadata(weights))
    source = Source("custom", file=file, weights=original, original=widths_of(module), decoder=decoder, terms=terms)
    if record is None:
        check_denoiser(module, spec, file)
    else:
        resize_(module, record, weights)
        load_weights_(module, [weights / "weights.safetensors"])
        spec = DenoiserSpec.from_json(record.get("spec"), f"{weights / RECORD}: spec")
    return Checkpoint(module, spec, source, **recorded_fields(record, weights, module))


class _Loaded(NamedTuple):
    module: nn.Module
    spec: DenoiserSpec
    decoder: nn.Module | None = None


def _call_load(file: Path, weights: Path) -> _Loaded:
    """Run the file's `load`; the modules are in eval mode, in float32 and on the CPU."""
    refuse_old_imports(file)
    with neighbours_importable(file.parent):
        with user_errors(file, "importing it"):
            code = run_file(file)
        if not callable(load := vars(code).get("load")) or getattr(load, "__module__", "").startswith("diffpress."):
            raise InvalidInputError(f"{file}: defines no function load(path)")
        with user_errors(file, f"load({weights})"):
            result = load(weights)
    expected = (nn.Module, DenoiserSpec, nn.Module)
    types = [type(value).__name__ for value in result] if isinstance(result, tuple) else [type(result).__name__]
    if not isinstance(result, tuple) or len(result) not in (2, 3) or not all(map(isinstance, result, expected)):
        raise InvalidInputError(
            f"{file}: load(path) must return (torch.nn.Module, DenoiserSpec), or with a decoder (torch.nn.Module, "
            f"DenoiserSpec, torch.nn.Module); it returns {', '.join(types) or 'an empty tuple'}"
        )
    module, spec, *decoder = result
    return _Loaded(_prepared(module), spec, *map(_prepared, decoder))


def _prepared(module: nn.Module) -> nn.Module:
    module = module.float().eval()
    if any(parameter.is_meta for parameter in module.parameters()):
        return module  # `_check_weights` names it
    module = module.cpu()
    if not any(parameter.requires_grad for parameter in module.parameters()):
        module.requires_grad_()  # loaded for inference; training needs gradients
    return module


def _check_weights(module: nn.Module, weights: Path) -> None:
    for name, tensor in module.state_dict().items():
        if tensor.is_meta:
            raise InvalidInputError(f"{weights}: tensor '{name}' has no values (it is on the meta device)")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InvalidInputError(
                f"{weights}: tensor '{name}' contains NaN or infinite values; the checkpoint is broken"
            )
