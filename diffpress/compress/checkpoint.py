"""Checkpoint = (model, spec, history), frozen; a stage returns a new one.

On disk it is the diffusers layout plus diffpress.json, which holds what diffusers has no place for:

    unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/...     (or weights.safetensors)
    vae/, text_encoder/, tokenizer/ ...     the pipeline's other parts, unchanged: hard links where the disk allows
    quantization.safetensors    scales, if it was quantized
    diffpress.json              spec, per-layer widths, quantized layers, history
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from diffpress.compress.models.widths import Widths, changed_widths
from diffpress.compress.sources.layout import link_components
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

FORMAT = 2
RECORD = "diffpress.json"
TENSOR_KINDS = ("amax", "smooth", "svdquant")  # of a Quantization, each a field of it


@dataclass(frozen=True)
class Record:
    """What one stage did: enough to repeat it and to see what it gained and cost.

    `seconds` are those of the process that finished it: a run that was killed and went on took longer.
    """

    stage: str
    config: dict[str, Any]
    seed: int
    changed: dict[str, Any]
    before: str
    after: str
    seconds: float = 0.0


@dataclass(frozen=True)
class Quantization:
    """Formats and scales as data. The checkpoint's weights stay in floating point; `fake_quantized` puts quantizers in.

    `amax` maps '<layer>.weight' ([out]), '<layer>.input' and '<module>.output' (scalars) to the largest magnitude that
    is not clipped. A layer is in `format` unless `formats` says otherwise (compress/quantization/formats.py). Where
    `smooth` has a layer ([in], positive), its activations are divided by it before they are rounded and its weight is
    multiplied by it, which changes nothing but what is rounded (SmoothQuant, Xiao et al. 2023); amax is of the results.
    `svdquant` maps '<layer>.down' ([rank, in]) and '<layer>.up' ([out, rank]) to factors whose product is taken from the
    weight before it is rounded, and computed in floating point beside the layer (compress/quantization/algorithms/svdquant.py).
    """

    format: str
    amax: dict[str, torch.Tensor] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    smooth: dict[str, torch.Tensor] = field(default_factory=dict)
    svdquant: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by the name under which a file stores them: 'amax.<layer>.input', 'smooth.<layer>'."""
        return {f"{kind}.{name}": value for kind in TENSOR_KINDS for name, value in getattr(self, kind).items()}

    @property
    def layers(self) -> list[str]:
        return sorted(name.removesuffix(".weight") for name in self.amax if name.endswith(".weight"))

    @property
    def layer_formats(self) -> dict[str, str]:
        """Layer -> name of its format, for every layer."""
        return {layer: self.format_of(layer) for layer in self.layers}

    def format_of(self, layer: str) -> str:
        """The name of the layer's format; what has no scale for its input is stored in it and no more."""
        return self.formats.get(layer, self.format)

    def without(self, places: Collection[str]) -> Quantization:
        """The same with these layers, and modules whose outputs are rounded, in float."""
        amax, svdquant = (
            {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in places}
            for tensors in (self.amax, self.svdquant)
        )
        formats = {layer: kind for layer, kind in self.formats.items() if layer not in places}
        smooth = {layer: vector for layer, vector in self.smooth.items() if layer not in places}
        return replace(self, amax=amax, formats=formats, smooth=smooth, svdquant=svdquant)

    def facts(self) -> dict[str, Any]:
        return {"format": self.format, "formats": self.formats}


@dataclass(frozen=True)
class Source:
    """How the unpruned module is built again: a diffusers class and config, or a user's file and weights.

    `parts` is the pipeline folder that holds what the denoiser needs around it: text encoders, tokenizers, decoder.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    folder: str = "unet"
    file: Path | None = None
    weights: Path | None = None
    parts: Path | None = None
    original: Widths = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    model: nn.Module
    spec: DenoiserSpec
    source: Source
    history: tuple[Record, ...] = ()
    quantization: Quantization | None = None

    def clone_model(self) -> nn.Module:
        """A copy that a stage may change: no stage changes its input."""
        return copy.deepcopy(self.model)

    def shared_model(self) -> nn.Module:
        """A copy with modules of its own and this one's tensors: for hooks and quantizers, not for training."""
        tensors = [*self.model.parameters(), *self.model.buffers()]
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def evolve(self, **changes: Any) -> Checkpoint:
        return replace(self, **changes)

    @cached_property
    def hash(self) -> str:
        """sha256 over everything that decides what this checkpoint computes and how it is sampled."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        tensors = dict(self.model.state_dict())
        if self.quantization is not None:
            tensors.update({f"quantization.{name}": value for name, value in self.quantization.tensors.items()})
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _facts(self) -> dict[str, Any]:
        return {
            "kind": self.source.kind,
            "config": self.source.config,
            "widths": changed_widths(self.model, self.source.original),
            "spec": self.spec.to_json(),
            "quantization": self.quantization.facts() if self.quantization else None,
        }


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint under a temporary name and rename it into place."""
    write_folder(folder, lambda temporary: _write(checkpoint, temporary))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary neighbour of `folder`, then put it in place, so that no half-written folder is ever seen."""
    temporary = folder.with_name(f".{folder.name}.partial")
    outgoing = folder.with_name(f".{folder.name}.outgoing")
    try:
        for leftover in (temporary, outgoing):
            shutil.rmtree(leftover, ignore_errors=True)
        temporary.mkdir(parents=True)
        fill(temporary)
        if folder.exists():
            os.replace(folder, outgoing)
        os.replace(temporary, folder)
        shutil.rmtree(outgoing, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # safetensors reports a full disk in a type of its own
        reason = getattr(error, "strerror", None) or error
        raise InvalidInputError(
            f"{folder}: cannot be written ({reason}); choose a folder with space that you may write to"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    source = checkpoint.source
    state = _unshared(checkpoint.model.state_dict())
    if source.kind == "custom":
        save_file(state, folder / "weights.safetensors")
        if source.weights is not None:
            copy_to = folder / f"original{source.weights.suffix}"
            (shutil.copytree if source.weights.is_dir() else shutil.copyfile)(source.weights, copy_to)
    else:
        parts = folder / source.folder
        parts.mkdir()
        (parts / "config.json").write_text(json.dumps(source.config, indent=2, sort_keys=True) + "\n")
        save_file(state, parts / "diffusion_pytorch_model.safetensors")
        if source.parts is not None:
            link_components(source.parts, folder, skip=(source.folder,))
        elif source.scheduler is not None:
            (folder / "scheduler").mkdir()
            text = json.dumps(source.scheduler, indent=2, sort_keys=True) + "\n"
            (folder / "scheduler" / "scheduler_config.json").write_text(text)
    if checkpoint.quantization is not None:
        save_file(_unshared(checkpoint.quantization.tensors), folder / "quantization.safetensors")
    facts = {
        "format": FORMAT,
        "kind": source.kind,
        "folder": source.folder,
        "widths": changed_widths(checkpoint.model, source.original),
        "quantization": checkpoint.quantization.facts() if checkpoint.quantization else None,
        "hash": checkpoint.hash,
        "history": [asdict(record) for record in checkpoint.history],
        "spec": checkpoint.spec.to_json(),
    }
    (folder / RECORD).write_text(json.dumps(facts, indent=1) + "\n")


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Contiguous CPU tensors, each with storage of its own: safetensors refuses tied weights otherwise."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        result[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return result
