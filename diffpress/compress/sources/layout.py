"""The diffusers layout on disk: locate the denoiser, read the components' configs, stream the weights.

    model_index.json                       the pipeline's class and the class of every component
    unet/ or transformer/                  config.json + safetensors (one file, or shards with an index)
    vae/ or vqvae/, text_encoder*/         the same
    tokenizer*/, scheduler/                files

Without model_index.json the components are those whose folders exist; a bare unet/ folder is a denoiser alone.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
DECODERS = ("vae", "vqvae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
USED = (*DENOISERS, *DECODERS, *TEXT_ENCODERS, *TOKENIZERS, "scheduler")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# (old class, norm_type) -> present class, as diffusers maps older folders
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
VOCABULARIES = (
    "tokenizer.json",
    "vocab.json",
    "spiece.model",
)  # without one transformers silently builds an empty tokenizer
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")


@dataclass(frozen=True)
class Layout:
    """Layout of a pipeline folder.

    Attributes:
        folder: The pipeline folder.
        denoiser: The denoiser's folder.
        config: The denoiser's config.json.
        index: model_index.json, {} if there is none.
        configs: config.json of the decoder and the text encoders, by component name.
        ignored: Components that sampling does not need, such as a safety checker.
    """

    folder: Path
    denoiser: Path
    config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """Class of the denoiser, under its present name."""
        name = str(self.config.get("_class_name"))
        return RENAMED.get((name, str(self.config.get("norm_type"))), name)

    @property
    def pipeline(self) -> str:
        """Class of the pipeline, '' if there is no index."""
        return str(self.index.get("_class_name", ""))

    @property
    def decoder(self) -> str | None:
        """Name of the component that decodes latents, None in pixel space."""
        return next((component for component in DECODERS if component in self.configs), None)

    @property
    def encoders(self) -> list[tuple[str, str]]:
        """(text encoder, tokenizer) pairs of the pipeline."""
        return [pair for pair in zip(TEXT_ENCODERS, TOKENIZERS, strict=True) if pair[0] in self.configs]

    def tokenizer(self, component: str) -> Any:
        """Load the transformers tokenizer in the subfolder `component`."""
        from transformers import AutoTokenizer

        if not any((self.folder / component / name).is_file() for name in VOCABULARIES):
            raise InvalidInputError(
                f"{self.folder / component}: has no {', '.join(VOCABULARIES)}; copy the whole pipeline again"
            )
        try:
            return AutoTokenizer.from_pretrained(self.folder / component)
        except Exception as error:  # tokenizer classes raise many types
            raise InvalidInputError(
                f"{self.folder / component}: the tokenizer cannot be loaded ({first_line(error)})"
            ) from error


def read_layout(folder: Path) -> Layout:
    """Read the configs of a pipeline folder.

    Raises:
        InvalidInputError: A component that the index lists is missing.
    """
    index = read_json(folder / INDEX, hint="") if (folder / INDEX).is_file() else {}
    denoiser = _denoiser_folder(folder, index)
    read = read_json(denoiser / "config.json", hint="")
    config = {key: value for key, value in read.items() if not key.startswith("_name_or_path")}
    if denoiser == folder:
        return Layout(folder, denoiser, config)
    listed = [name for name, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]
    for name in listed:
        if name in USED and not (folder / name).is_dir():
            raise InvalidInputError(
                f"{folder}: component '{name}' of {INDEX} is missing; copy the whole pipeline again"
            )
    present = listed if index else [name for name in USED if (folder / name).is_dir()]
    configs = {
        name: read_json(folder / name / "config.json", hint="")
        for name in present
        if name in (*DECODERS, *TEXT_ENCODERS) and name != denoiser.name
    }
    ignored = tuple(name for name in listed if name not in USED)
    return Layout(folder, denoiser, config, index, configs, ignored)


def _denoiser_folder(folder: Path, index: dict[str, Any]) -> Path:
    for candidate in (*(folder / name for name in DENOISERS), folder):
        if (candidate / "config.json").is_file():
            return candidate
    listed = [name for name in DENOISERS if name in index]
    if listed:
        raise InvalidInputError(
            f"{folder}: component '{listed[0]}' of {INDEX} is missing; copy the whole pipeline again"
        )
    raise InvalidInputError(f"{folder}: has neither unet/config.json nor transformer/config.json nor config.json")


def weight_files(component: Path) -> list[Path]:
    """Return the safetensors files of a component's folder.

    Raises:
        InvalidInputError: There are none, several without an index, or only pickles.
    """
    variant = variant_of(component)
    for name in WEIGHTS:
        index = component / (f"{name}.index.{variant}.json" if variant else f"{name}.index.json")
        if index.is_file():
            names = read_json(index, hint="").get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise InvalidInputError(f"{index}: has no weight_map from tensor names to files; copy it again")
            return [component / file for file in sorted(set(names.values()))]
    plain = [component / name for name in WEIGHTS if (component / name).is_file()]
    found = plain[:1] or sorted(component.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = sorted(p.name for p in component.iterdir() if p.suffix in PICKLES)
    if pickles and not found:
        raise InvalidInputError(
            f"{component}: has only {pickles[0]}; pickles can run arbitrary code and are not loaded: "
            "save it as safetensors first (model.save_pretrained)"
        )
    count = f"several ({', '.join(p.name for p in found)})" if found else "no"
    raise InvalidInputError(f"{component}: {count} weight files; expected {WEIGHTS[0]}")


def load_weights_(model: nn.Module, files: list[Path], dtype: torch.dtype = torch.float32) -> None:
    """Load safetensors into `model` tensor by tensor as `dtype`, checking names, shapes and finiteness.

    A tensor that is stored as `dtype` stays a view of the memory-mapped file, so nothing is held twice; a module built
    on the meta device allocates nothing else.

    Raises:
        InvalidInputError: A file is unreadable, or a tensor is unknown, missing, of the wrong shape or not finite.
    """
    state = model.state_dict(keep_vars=True)
    missing = set(state)
    for file in files:
        for name, tensor in _tensors(file):
            if name not in state:
                raise InvalidInputError(
                    f"{file}: tensor '{name}' does not belong to this model; is it a foreign checkpoint?"
                )
            if tensor.shape != state[name].shape:
                raise InvalidInputError(
                    f"{file}: tensor '{name}' has shape {list(tensor.shape)}, "
                    f"the config requires {list(state[name].shape)}"
                )
            if tensor.is_floating_point():
                # aminmax propagates NaN and, unlike isfinite on the tensor, allocates no second tensor
                if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
                    raise InvalidInputError(
                        f"{file}: tensor '{name}' contains NaN or infinite values; the checkpoint is broken"
                    )
                tensor = tensor.to(dtype)
            _put_(model, name, tensor)
            missing.discard(name)
    if missing:
        raise InvalidInputError(f"{files[0]}: tensor '{sorted(missing)[0]}' is missing ({len(missing)} in all)")


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"{file}: not readable as safetensors ({error}); it may be truncated, copy it again"
        ) from error


def _put_(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


def link_components(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Link the files of a pipeline into `target`, except the components in `skip`; copy where links are unsupported.

    Stages change only the denoiser, and the other components can be gigabytes.
    """
    for entry in sorted(source.iterdir()):
        if entry.name in skip or entry.name not in (*USED, INDEX):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(target / entry.name))


def link_or_copy(source: str, target: str) -> None:
    """Create a hard link to `source` at `target`, or a copy if the file system does not support links."""
    try:
        os.link(os.path.realpath(source), target)  # hub caches hold symlinks
    except OSError:
        shutil.copyfile(source, target)


def first_line(error: BaseException) -> str:
    """Return the first line of an error message, at most 200 characters."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def variant_of(component: Path) -> str | None:
    """Return the variant of a component's weights, such as 'fp16' for model.fp16.safetensors; None for plain names."""
    if any((component / name).is_file() or (component / f"{name}.index.json").is_file() for name in WEIGHTS):
        return None
    found = [VARIANT.search(file.name) for file in sorted(component.glob("*.safetensors"))]
    return next((match[1] for match in found if match), None)
