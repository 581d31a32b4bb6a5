"""The diffusers layout on disk: which folder is the denoiser, what its other parts say, and its weights, streamed.

    model_index.json                       the pipeline's class and the class of every part
    unet/ or transformer/                  config.json + safetensors (one file, or several with an index)
    vae/ or vqvae/, text_encoder*/         the same
    tokenizer*/, scheduler/                files

A folder without model_index.json is taken for what it holds; a bare unet/ folder is a denoiser alone.
"""

from __future__ import annotations

import json
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

INDEX = "model_index.json"
DENOISERS = ("unet", "transformer")
DECODERS = ("vae", "vqvae")
TEXT_ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3")
TOKENIZERS = ("tokenizer", "tokenizer_2", "tokenizer_3")
USED = (*DENOISERS, *DECODERS, *TEXT_ENCODERS, *TOKENIZERS, "scheduler")
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
# what diffusers splits a class into when it reads older folders, by the config's norm_type
RENAMED = {
    ("Transformer2DModel", "ada_norm_zero"): "DiTTransformer2DModel",
    ("Transformer2DModel", "ada_norm_single"): "PixArtTransformer2DModel",
}
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model")  # without one transformers knows no word, and is silent
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")


@dataclass(frozen=True)
class Layout:
    """A pipeline folder as found: the denoiser's own folder, the index ({} where there is none), every part's config.

    `configs` holds the config.json of the denoiser's companions by part name; `ignored` are parts that sampling needs
    not, such as a safety checker.
    """

    folder: Path
    denoiser: Path
    config: dict[str, Any]
    index: dict[str, Any] = field(default_factory=dict)
    configs: dict[str, dict[str, Any]] = field(default_factory=dict)
    ignored: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """The denoiser's class, under its present name."""
        name = str(self.config.get("_class_name"))
        return RENAMED.get((name, str(self.config.get("norm_type"))), name)

    @property
    def pipeline(self) -> str:
        return str(self.index.get("_class_name", ""))

    @property
    def decoder(self) -> str | None:
        """The part that turns latents into images."""
        return next((part for part in DECODERS if part in self.configs), None)

    @property
    def encoders(self) -> list[tuple[str, str]]:
        """(text encoder, its tokenizer) for those the pipeline has."""
        return [pair for pair in zip(TEXT_ENCODERS, TOKENIZERS, strict=True) if pair[0] in self.configs]

    def tokenizer(self, part: str) -> Any:
        """The transformers tokenizer in the folder `part`."""
        from transformers import AutoTokenizer

        if not any((self.folder / part / name).is_file() for name in VOCABULARIES):
            raise InvalidInputError(
                f"{self.folder / part}: no {', '.join(VOCABULARIES)} in it; copy the whole pipeline again"
            )
        try:
            return AutoTokenizer.from_pretrained(self.folder / part)
        except Exception as error:  # each tokenizer class has failures of its own
            raise InvalidInputError(
                f"{self.folder / part}: no tokenizer can be read from it ({first_line(error)})"
            ) from error


def read_layout(folder: Path) -> Layout:
    """Read a pipeline's configs; InvalidInputError where a part that the index promises is missing."""
    index = read_json(folder / INDEX) if (folder / INDEX).is_file() else {}
    denoiser = _denoiser_folder(folder, index)
    config = {k: v for k, v in read_json(denoiser / "config.json").items() if not k.startswith("_name_or_path")}
    if denoiser == folder:
        return Layout(folder, denoiser, config)
    promised = [part for part, entry in index.items() if isinstance(entry, list) and len(entry) == 2 and entry[1]]
    for part in promised:
        if part in USED and not (folder / part).is_dir():
            raise InvalidInputError(
                f"{folder}: {INDEX} names a part '{part}', which is missing; copy the whole pipeline again"
            )
    present = promised if index else [part for part in USED if (folder / part).is_dir()]
    configs = {
        part: read_json(folder / part / "config.json")
        for part in present
        if part in (*DECODERS, *TEXT_ENCODERS) and part != denoiser.name
    }
    ignored = tuple(part for part in promised if part not in USED)
    return Layout(folder, denoiser, config, index, configs, ignored)


def _denoiser_folder(folder: Path, index: dict[str, Any]) -> Path:
    for candidate in (*(folder / part for part in DENOISERS), folder):
        if (candidate / "config.json").is_file():
            return candidate
    named = [part for part in DENOISERS if part in index]
    if named:
        raise InvalidInputError(
            f"{folder}: {INDEX} names a part '{named[0]}', which is missing; copy the whole pipeline again"
        )
    raise InvalidInputError(f"{folder}: no unet/ or transformer/ with a config.json in it, and no config.json itself")


# --- weights ---------------------------------------------------------------------------------------------------


def weight_files(part: Path) -> list[Path]:
    """The safetensors files of one part; InvalidInputError where there are none, several without an index, or pickles only."""
    variant = variant_of(part)
    for name in WEIGHTS:
        index = part / (f"{name}.index.{variant}.json" if variant else f"{name}.index.json")
        if index.is_file():
            names = read_json(index).get("weight_map")
            if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
                raise InvalidInputError(f"{index}: has no weight_map of tensor names to files; copy it again")
            return [part / file for file in sorted(set(names.values()))]
    plain = [part / name for name in WEIGHTS if (part / name).is_file()]
    found = plain[:1] or sorted(part.glob("*.safetensors"))
    if len(found) == 1:
        return found
    pickles = sorted(p.name for p in part.iterdir() if p.suffix in PICKLES)
    if pickles and not found:
        raise InvalidInputError(
            f"{part}: has only {pickles[0]}; a pickle can run any code when read, so diffpress does not: "
            "save it as safetensors first (model.save_pretrained)"
        )
    count = f"several ({', '.join(p.name for p in found)})" if found else "no"
    raise InvalidInputError(f"{part}: {count} weight files; {WEIGHTS[0]} is expected")


def load_weights_(model: nn.Module, files: list[Path], dtype: torch.dtype = torch.float32) -> None:
    """Put safetensors into the module tensor by tensor as `dtype`, checking names, shapes and finiteness.

    A tensor that is stored in this dtype already stays a view of the mapped file: nothing is held twice, and a module
    built on the meta device never holds anything else.
    """
    state = model.state_dict(keep_vars=True)
    missing = set(state)
    for file in files:
        for name, tensor in _tensors(file):
            if name not in state:
                raise InvalidInputError(f"{file}: tensor '{name}' does not belong to this model; a foreign checkpoint?")
            if tensor.shape != state[name].shape:
                raise InvalidInputError(
                    f"{file}: tensor '{name}' has shape {list(tensor.shape)}, "
                    f"the config asks for {list(state[name].shape)}"
                )
            if tensor.is_floating_point():
                # a NaN is both ends of its tensor: this needs no second tensor of the same size
                if tensor.numel() and not all(torch.isfinite(end) for end in tensor.aminmax()):
                    raise InvalidInputError(
                        f"{file}: tensor '{name}' holds NaN or infinite values; the checkpoint is broken"
                    )
                tensor = tensor.to(dtype)
            _put_(model, name, tensor)
            missing.discard(name)
    if missing:
        raise InvalidInputError(f"{files[0]}: tensor '{sorted(missing)[0]}' is missing ({len(missing)} in all)")


def _tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name in tensors:
                yield name, tensors.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(f"{file}: not readable as safetensors ({error}); truncated? copy it again") from error


def _put_(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor


# --- files -----------------------------------------------------------------------------------------------------


def link_components(source: Path, target: Path, skip: tuple[str, ...]) -> None:
    """Give `target` the files of a pipeline except the parts in `skip`: hard links where the disk allows, else copies.

    A stage changes the denoiser alone, and the others may weigh gigabytes.
    """
    for entry in sorted(source.iterdir()):
        if entry.name in skip or entry.name not in (*USED, INDEX):
            continue
        if entry.is_dir():
            shutil.copytree(entry, target / entry.name, copy_function=link_or_copy)
        else:
            link_or_copy(str(entry), str(target / entry.name))


def link_or_copy(source: str, target: str) -> None:
    """A hard link to `source` at `target`, a copy where the disk has none."""
    try:
        os.link(os.path.realpath(source), target)  # hub caches hold symlinks
    except OSError:
        shutil.copyfile(source, target)


def read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text())
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise InvalidInputError(f"{path}: not readable as JSON ({error})") from error
    if not isinstance(data, dict):
        raise InvalidInputError(f"{path}: expected a JSON object")
    return data


def first_line(error: BaseException) -> str:
    """The first line of a message: some libraries write pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def variant_of(part: Path) -> str | None:
    """'fp16' where a part is stored as model.fp16.safetensors (or in pieces) alone, None for the plain names."""
    if any((part / name).is_file() or (part / f"{name}.index.json").is_file() for name in WEIGHTS):
        return None
    found = [VARIANT.search(file.name) for file in sorted(part.glob("*.safetensors"))]
    return next((match[1] for match in found if match), None)
