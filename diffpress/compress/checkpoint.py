"""Checkpoint: a frozen (model, spec, history); each stage returns a new one.

On disk a checkpoint is the diffusers layout plus diffpress.json, which holds what diffusers cannot store:

    unet/config.json, unet/diffusion_pytorch_model.safetensors, scheduler/...     (or weights.safetensors)
    vae/, text_encoder/, tokenizer/ ...     the pipeline's other components, unchanged; hard links if supported
    LICENSE, NOTICE, README.md, ...         the licence and model card it came with
    quantization.safetensors    quantization scales, if the checkpoint is quantized
    quantization.<component>.safetensors    quantization scales of another component, if it is quantized
    diffpress.json              spec, per-layer widths, kept indices, removed blocks, ranks, quantized layers, history.
                                Its `pipeline`, written by hand, is a folder relative to this one whose other components
                                are used
"""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import nn

from diffpress.compress.models.kept_indices import KeptIndices, kept_of_unsaved, kept_to_json
from diffpress.compress.models.low_rank_layers import low_rank_layers
from diffpress.compress.models.removed_blocks import removed_blocks
from diffpress.compress.models.widths import Widths, changed_widths
from diffpress.compress.sources.layout import link_components
from diffpress.compress.sources.terms import Terms, write_terms
from diffpress.runtime.io.files import atomic_folder
from diffpress.runtime.spec import DenoiserSpec

FORMAT = 2
RECORD = "diffpress.json"
SCALES = "quantization"  # stem of the files of scales
TENSOR_KINDS = ("amax", "smooth", "svdquant")  # the tensor fields of Quantization


@dataclass(frozen=True)
class Record:
    """History entry of one stage: its config, and what it changed.

    `seconds` is the wall time of the process that finished the stage; a resumed stage took longer in total.
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
    """Quantization formats and scales. The weights stay in floating point; `fake_quantized` inserts quantizers.

    Attributes:
        format: Default format of the quantized layers (compress/quantization/formats.py).
        amax: Largest unclipped magnitude of each quantized tensor: '<layer>.weight' [out]; '<layer>.input' and
            '<module>.output' scalars. Computed after smoothing.
        formats: Per-layer overrides of `format`.
        smooth: Layer -> positive smoothing factors [in]. Activations are divided by them before rounding and the weight
            is multiplied by them, so the float output is unchanged (SmoothQuant, Xiao et al. 2023).
        svdquant: '<layer>.down' [rank, in] and '<layer>.up' [out, rank]. Their product is subtracted from the weight
            before rounding and computed in floating point beside the layer
            (compress/quantization/algorithms/svdquant.py).
    """

    format: str
    amax: dict[str, torch.Tensor] = field(default_factory=dict)
    formats: dict[str, str] = field(default_factory=dict)
    smooth: dict[str, torch.Tensor] = field(default_factory=dict)
    svdquant: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by their name in the safetensors file: 'amax.<layer>.input', 'smooth.<layer>'."""
        return {f"{kind}.{name}": value for kind in TENSOR_KINDS for name, value in getattr(self, kind).items()}

    @property
    def layers(self) -> list[str]:
        """Sorted names of the layers with a quantized weight."""
        return sorted(name.removesuffix(".weight") for name in self.amax if name.endswith(".weight"))

    @property
    def layer_formats(self) -> dict[str, str]:
        """Format name of every quantized layer."""
        return {layer: self.format_of(layer) for layer in self.layers}

    def format_of(self, layer: str) -> str:
        """Return the layer's format; without an input scale only the layer's weight is stored in it."""
        return self.formats.get(layer, self.format)

    def without(self, modules: Collection[str]) -> Quantization:
        """Return a copy with these layers, and these modules' outputs, in float."""
        amax, svdquant = (
            {key: value for key, value in tensors.items() if key.rpartition(".")[0] not in modules}
            for tensors in (self.amax, self.svdquant)
        )
        formats = {layer: kind for layer, kind in self.formats.items() if layer not in modules}
        smooth = {layer: vector for layer, vector in self.smooth.items() if layer not in modules}
        return replace(self, amax=amax, formats=formats, smooth=smooth, svdquant=svdquant)

    def facts(self) -> dict[str, Any]:
        """Return the part that is stored as JSON in diffpress.json."""
        return {"format": self.format, "formats": self.formats}


@dataclass(frozen=True)
class Source:
    """How to rebuild the unpruned module: a diffusers class and config, or a user's file and weights.

    `pipeline_folder` holds the other components of the pipeline: text encoders, tokenizers, decoder. `original` holds
    the widths of the unpruned module. `decoder` is that of a user's file. `autoencoder` is a folder in place of the
    pipeline's autoencoder. `terms` are the files of its licence.
    """

    kind: str
    config: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] | None = None
    folder: str = "unet"
    file: Path | None = None
    weights: Path | None = None
    pipeline_folder: Path | None = None
    original: Widths = field(default_factory=dict)
    decoder: nn.Module | None = None
    autoencoder: Path | None = None
    terms: Terms = field(default_factory=dict)


@dataclass(frozen=True)
class Checkpoint:
    """A denoiser with its spec, source, history and quantization.

    Attributes:
        model: The denoiser.
        spec: Its spec.
        source: How to rebuild it.
        history: One record per stage.
        quantization: Formats and scales of the denoiser; None if it is not quantized.
        component_quantization: Formats and scales of other components of its pipeline, by the names of their graphs.
        kept_indices: What its tensors keep of those of the unpruned model.
        sparse_layers: Layers whose weights are 2:4 sparse; training keeps their zeros.

    Examples:
        >>> import diffpress as dp
        >>> loaded = dp.load(checkpoint)
        >>> isinstance(loaded, dp.Checkpoint), len(loaded.history)
        (True, 0)
    """

    model: nn.Module
    spec: DenoiserSpec
    source: Source
    history: tuple[Record, ...] = ()
    quantization: Quantization | None = None
    component_quantization: Mapping[str, Quantization] = field(default_factory=dict)
    kept_indices: KeptIndices = field(default_factory=dict)
    sparse_layers: tuple[str, ...] = ()

    def __repr__(self) -> str:
        plan, stages = self.spec.plan, [record.stage for record in self.history]
        return f"Checkpoint({self.source.kind}, {plan.steps} steps of {plan.solver}, history={stages})"

    def clone_model(self) -> nn.Module:
        """Return a deep copy, for stages that modify weights: a stage never modifies its input."""
        _detach_computed_(self.model)
        return copy.deepcopy(self.model)

    def shared_model(self) -> nn.Module:
        """Return a copy that shares this model's tensors: for hooks and quantizers, not for training."""
        return shared_copy(self.model)

    def evolve(self, **changes: Any) -> Checkpoint:
        """Return a copy with the given fields replaced."""
        return replace(self, **changes)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over everything that affects the checkpoint's output and sampling; history is excluded."""
        digest = hashlib.sha256(json.dumps(self._facts(), sort_keys=True).encode())
        tensors = dict(self.model.state_dict())
        for prefix, scales in self._all_scales().items():
            tensors.update({f"{prefix}.{name}": value for name, value in scales.tensors.items()})
        if self.source.decoder is not None:
            tensors.update({f"decoder.{name}": value for name, value in self.source.decoder.state_dict().items()})
        for name in sorted(tensors):
            digest.update(name.encode())
            digest.update(tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _facts(self) -> dict[str, Any]:
        removed, tables = removed_blocks(self.model), kept_of_unsaved(self.kept_indices, self.model)
        return {
            "kind": self.source.kind,
            "config": self.source.config,
            "widths": changed_widths(self.model, self.source.original),
            "spec": self.spec.to_json(),
            "quantization": self.quantization.facts() if self.quantization else None,
            **({"components": self._component_facts()} if self.component_quantization else {}),
            **({"removed_blocks": removed} if removed else {}),
            **({"kept_of_unsaved": tables} if tables else {}),
            **({"sparse_layers": self.sparse_layers} if self.sparse_layers else {}),
        }

    def _component_facts(self) -> dict[str, Any]:
        return {name: scales.facts() for name, scales in self.component_quantization.items()}

    def _all_scales(self) -> dict[str, Quantization]:
        """Return the scales of the denoiser and of other components, by file stem."""
        own = {} if self.quantization is None else {SCALES: self.quantization}
        return own | {f"{SCALES}.{name}": scales for name, scales in self.component_quantization.items()}


def shared_copy(model: nn.Module) -> nn.Module:
    """Return a copy of a module that shares its tensors."""
    _detach_computed_(model)
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(tensor): tensor for tensor in tensors})


def _detach_computed_(model: nn.Module) -> None:
    """Detach what a hook computes from parameters, as torch's older weight_norm does: it cannot be copied."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())


def save_checkpoint(checkpoint: Checkpoint, folder: Path) -> None:
    """Write the checkpoint to a temporary folder and rename it to `folder`."""
    write_folder(folder, lambda temporary: _write(checkpoint, temporary))


def write_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Call `fill` on a temporary sibling folder and rename it to `folder`, so that no partial folder is ever visible.

    Raises:
        InvalidInputError: The folder cannot be written.
    """
    hint = "choose a writable folder with enough space"
    # safetensors reports a full disk with its own type
    with atomic_folder(folder, hint, errors=SafetensorError) as temporary:
        fill(temporary)


def _write(checkpoint: Checkpoint, folder: Path) -> None:
    source = checkpoint.source
    state = _unshared(checkpoint.model.state_dict())
    if source.kind == "custom":
        save_file(state, folder / "weights.safetensors")
        if source.weights is not None:
            copy_to = folder / f"original{source.weights.suffix}"
            (shutil.copytree if source.weights.is_dir() else shutil.copyfile)(source.weights, copy_to)
    else:
        denoiser = folder / source.folder
        denoiser.mkdir()
        (denoiser / "config.json").write_text(json.dumps(source.config, indent=2, sort_keys=True) + "\n")
        save_file(state, denoiser / "diffusion_pytorch_model.safetensors")
        if source.pipeline_folder is not None:
            link_components(source.pipeline_folder, folder, skip=(source.folder,))
        elif source.scheduler is not None:
            (folder / "scheduler").mkdir()
            text = json.dumps(source.scheduler, indent=2, sort_keys=True) + "\n"
            (folder / "scheduler" / "scheduler_config.json").write_text(text)
    write_terms(source.terms, folder)
    for stem, scales in checkpoint._all_scales().items():
        save_file(_unshared(scales.tensors), folder / f"{stem}.safetensors")
    facts = {
        "format": FORMAT,
        "kind": source.kind,
        "folder": source.folder,
        "widths": changed_widths(checkpoint.model, source.original),
        "removed_blocks": removed_blocks(checkpoint.model),
        "low_rank_layers": low_rank_layers(checkpoint.model),
        "kept_indices": kept_to_json(checkpoint.kept_indices),
        "sparse_layers": checkpoint.sparse_layers,
        "quantization": checkpoint.quantization.facts() if checkpoint.quantization else None,
        "components": checkpoint._component_facts(),
        "hash": checkpoint.hash,
        "history": [asdict(record) for record in checkpoint.history],
        "spec": checkpoint.spec.to_json(),
    }
    (folder / RECORD).write_text(json.dumps(facts, indent=1) + "\n")


def _unshared(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return contiguous CPU tensors with separate storage: safetensors refuses tied weights."""
    seen: set[int] = set()
    result = {}
    for name, tensor in state.items():
        own = tensor.detach().cpu().contiguous()
        result[name] = own.clone() if own.untyped_storage().data_ptr() in seen else own
        seen.add(own.untyped_storage().data_ptr())
    return result
