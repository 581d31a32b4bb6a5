"""Weights of one component: find its safetensors files and stream them into a module, every tensor accounted for.

    diffusion_pytorch_model.safetensors, model.safetensors       one file
    *.safetensors.index.json + shards                            several
    *.fp16.safetensors                                           a variant, if there are no plain files

A tensor that is missing, left over, of another shape, not finite or already quantized is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.files import read_json

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
WEIGHTS = ("diffusion_pytorch_model.safetensors", "model.safetensors")
VARIANT = re.compile(r"\.(\w+)(?:-\d+-of-\d+)?\.safetensors$")
# what bitsandbytes, GPTQ, AWQ, quanto, compressed-tensors and scaled float8 files store beside a quantized weight
QUANTIZED = re.compile(
    r"(?:^|\.)(?:SCB|weight_format|(?:nested_)?(?:absmax|quant_map)|quant_state\..+|qweight|qzeros|scales|g_idx|_data|"
    r"_scale|_shift|weight_packed|weight_(?:scale(?:_inv|_2)?|zero_point)|input_scale|scale_(?:weight|input)|scaled_fp8|"
    r"comfy_quant)$"
)
INTEGERS = ("I8", "U8", "F4")  # safetensors' names of types that only quantized weights have


def weight_files(component: Path) -> list[Path]:
    """Return the safetensors files of a component's folder.

    Raises:
        InvalidInputError: There are none, several without an index, or only pickles.
    """
    variant = variant_of(component)
    for name in WEIGHTS:
        index = component / (f"{name}.index.{variant}.json" if variant else f"{name}.index.json")
        if index.is_file():
            return _shards(index)
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


def _shards(index: Path) -> list[Path]:
    names = read_json(index, hint="").get("weight_map")
    if not isinstance(names, dict) or not names or not all(isinstance(file, str) for file in names.values()):
        raise InvalidInputError(f"{index}: has no weight_map from tensor names to files; copy it again")
    files = [index.parent / file for file in sorted(set(names.values()))]
    for file in files:
        if file.parent != index.parent or file.name == "..":
            raise InvalidInputError(f"{index}: names {str(file)!r}, which is not beside it; copy the checkpoint again")
        if not file.is_file():
            raise InvalidInputError(f"{file}: is listed in {index.name} but missing; copy it again")
    return files


def variant_of(component: Path) -> str | None:
    """Return the variant of a component's weights, such as 'fp16' for model.fp16.safetensors; None for plain names."""
    if any((component / name).is_file() or (component / f"{name}.index.json").is_file() for name in WEIGHTS):
        return None
    found = [VARIANT.search(file.name) for file in sorted(component.glob("*.safetensors"))]
    return next((match[1] for match in found if match), None)


def tensor_types(file: Path) -> dict[str, tuple[str, list[int]]]:
    """Return safetensors' dtype and the shape of every tensor of a file; only the header is read."""
    with _opened(file) as tensors:
        parts = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}


def tensor_shapes(file: Path) -> dict[str, list[int]]:
    """Return the shape of every tensor of a safetensors file; only the header is read."""
    return {name: shape for name, (_, shape) in tensor_types(file).items()}


def header_metadata(file: Path) -> dict[str, str]:
    """Return the metadata in the header of a safetensors file."""
    with _opened(file) as tensors:
        return dict(tensors.metadata() or {})


def refuse_quantized(file: Path) -> None:
    """Raise InvalidInputError if the file holds weights that are already quantized, judged by its header."""
    for name, (dtype, _) in tensor_types(file).items():
        if QUANTIZED.search(name) or (name.endswith("weight") and dtype in INTEGERS):
            raise InvalidInputError(_is_quantized(file, name))


def load_weights_(
    model: nn.Module, files: list[Path], dtype: torch.dtype = torch.float32, optional: tuple[str, ...] = ()
) -> None:
    """Load safetensors into `model` tensor by tensor as `dtype`, checking names, shapes and finiteness.

    A tensor that is stored as `dtype` stays a view of the memory-mapped file, so nothing is held twice; a module built
    on the meta device allocates nothing else. Names from before diffusers renamed its attention layers are renamed as
    `from_pretrained` does.

    Args:
        model: The module.
        files: Safetensors files.
        dtype: Floating-point type in memory.
        optional: Prefixes of tensors that may be missing; they keep what the module holds.

    Raises:
        InvalidInputError: A file is unreadable, or a tensor is unknown, missing, quantized, of the wrong shape or not
            finite.
    """
    state = model.state_dict(keep_vars=True)
    names = _names_in_model(model, files)
    ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    missing = {name for name in state if not name.startswith(optional)} if optional else set(state)
    for file in files:
        for stored, tensor in read_tensors(file):
            name = names.get(stored, "")
            if name not in state:
                if any(re.search(pattern, stored) for pattern in ignored):
                    continue
                raise InvalidInputError(_is_unknown(file, stored))
            if tensor.shape != state[name].shape:
                raise InvalidInputError(
                    f"{file}: tensor '{stored}' has shape {list(tensor.shape)}, "
                    f"the config requires {list(state[name].shape)}"
                )
            if state[name].is_floating_point() and not tensor.is_floating_point():
                raise InvalidInputError(_is_quantized(file, stored))
            if tensor.is_floating_point():
                tensor = tensor.to(dtype)
                if not is_finite(tensor):
                    raise InvalidInputError(
                        f"{file}: tensor '{stored}' contains NaN or infinite values; the checkpoint is broken"
                    )
            _put_(model, name, tensor)
            missing.discard(name)
    if missing:
        raise InvalidInputError(
            f"{files[0]}: tensor '{sorted(missing)[0]}' is missing ({len(missing)} in all); copy the file again"
        )


def unread_tensors(
    tensors: dict[str, torch.Tensor], convert: Callable[[dict[str, torch.Tensor]], Iterable[torch.Tensor]]
) -> list[str]:
    """Return the names of the tensors that none of the tensors returned by `convert` was computed from.

    Autograd traces the conversion, so any renaming, splitting and scaling is followed. On the meta device it costs no
    memory.
    """
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    # copies: some conversions scale in place
    outputs = [tensor.sum() for tensor in convert({name: leaf.clone() for name, leaf in leaves.items()})]
    if not outputs:
        return list(tensors)
    gradients = torch.autograd.grad(outputs, list(leaves.values()), allow_unused=True)
    return [name for name, gradient in zip(leaves, gradients, strict=True) if gradient is None]


def is_finite(tensor: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite."""
    # aminmax propagates NaN and, unlike isfinite on the tensor, allocates no second tensor
    return not tensor.numel() or all(bool(torch.isfinite(end)) for end in tensor.aminmax())


def _names_in_model(model: nn.Module, files: list[Path]) -> dict[str, str]:
    """Return the name in the module for every tensor name in the files."""
    stored = {name: name for file in files for name in tensor_shapes(file)}
    rename_: Any = getattr(model, "_fix_state_dict_keys_on_load", None)
    if rename_ is not None:
        rename_(stored)
    return {old: new for new, old in stored.items()}


def _is_unknown(file: Path, name: str) -> str:
    if QUANTIZED.search(name):
        return _is_quantized(file, name)
    return f"{file}: tensor '{name}' does not belong to this model; is it a foreign checkpoint?"


def _is_quantized(file: Path, name: str) -> str:
    return f"{file}: is already quantized (tensor '{name}'); start from the checkpoint in float32, float16 or bfloat16"


def _opened(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InvalidInputError(
            f"{file}: not readable as safetensors ({error}); it may be truncated, copy it again"
        ) from error


def read_tensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of a safetensors file with their names, one at a time."""
    with _opened(file) as tensors:
        for name in tensors.keys():
            yield name, tensors.get_tensor(name)


def _put_(model: nn.Module, name: str, tensor: torch.Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    module: Any = model.get_submodule(owner)
    if leaf in module._parameters:
        old = module._parameters[leaf]
        module._parameters[leaf] = nn.Parameter(tensor, requires_grad=old.requires_grad and tensor.is_floating_point())
    else:
        module._buffers[leaf] = tensor
