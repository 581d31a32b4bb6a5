"""Per-layer widths as JSON: rebuild a pruned module from the unpruned config, without pickle.

    {"down_blocks.0.resnets.0.conv1": {"in_channels": 48, "out_channels": 40},
     "norm": {"normalized_shape": [24, 8, 8]}, "": {"class_token": [1, 1, 24]}, ...}

A layer of a known kind is recorded by its attributes, every other parameter or buffer by its shape. `changed_widths`
lists the layers that differ from the unpruned module; `apply_widths_` resizes a freshly built module, whose weights are
then loaded from safetensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd

from diffpress.runtime.errors import InvalidInputError

# layer type -> attributes that determine the shapes of its parameters and buffers
SHAPED: tuple[tuple[type[nn.Module] | tuple[type[nn.Module], ...], tuple[str, ...]], ...] = (
    (_ConvNd, ("in_channels", "out_channels", "groups")),
    (nn.Linear, ("in_features", "out_features")),
    (nn.GroupNorm, ("num_channels", "num_groups")),
    (nn.Embedding, ("num_embeddings", "embedding_dim")),
    ((nn.LayerNorm, nn.RMSNorm), ("normalized_shape",)),
    (_NormBase, ("num_features",)),  # BatchNorm and InstanceNorm
    (nn.PReLU, ("num_parameters",)),
)

Widths = dict[str, dict[str, Any]]  # widths are an int, or a list of ints for a shape
Shape = tuple[int, ...]


def layer_widths(module: nn.Module) -> dict[str, Any] | None:
    """Return the widths of a layer, the heads of an attention, or the shapes of other tensors; None without any."""
    found: dict[str, Any] = {}
    attributes = next((names for kind, names in SHAPED if isinstance(module, kind)), ())
    for name in attributes:
        value = getattr(module, name)
        found[name] = int(value) if isinstance(value, int) else [int(size) for size in value]
    heads = getattr(module, "heads", None)
    if not attributes and isinstance(heads, int):
        found["heads"] = heads
    implied = _shapes(module)
    for name, tensor in _own_tensors(module).items():
        if name not in implied and tensor.ndim > 0:
            found[name] = list(tensor.shape)
    return found or None


def widths_of(model: nn.Module) -> Widths:
    """Return the widths of all layers by name."""
    found = {name: layer_widths(module) for name, module in model.named_modules()}
    return {name: widths for name, widths in found.items() if widths is not None}


def changed_widths(model: nn.Module, original: Widths) -> Widths:
    """Return the widths of the layers that differ from `original`."""
    return {name: widths for name, widths in widths_of(model).items() if original.get(name) != widths}


def apply_widths_(model: nn.Module, widths: Widths, where: str) -> None:
    """Resize the named layers of `model`; resized parameters are new and uninitialized.

    Raises:
        InvalidInputError: The widths do not match the model; the message starts with `where`.
    """
    modules = dict(model.named_modules())
    if not isinstance(widths, dict):
        raise InvalidInputError(f"{where}: widths must be a JSON object with one entry per layer")
    shapes: dict[int, Shape] = {}
    for name, new in widths.items():
        module: Any = modules.get(name)
        known = layer_widths(module) if module is not None else None
        if module is None or known is None or not isinstance(new, dict) or set(known) != set(new):
            raise InvalidInputError(f"{where}: widths name a layer '{name}' that this model does not have")
        if not all(_is_width(value, known[key]) for key, value in new.items()):
            raise InvalidInputError(f"{where}: layer '{name}' has a width that is not a positive integer")
        tensors = _own_tensors(module)
        for key, value in new.items():
            if key in tensors:
                shapes[id(tensors[key])] = tuple(value)
            else:
                setattr(module, key, tuple(value) if isinstance(value, list) else value)
        shapes |= {id(tensors[key]): shape for key, shape in _shapes(module).items() if key in tensors}
    replace_tensors_(
        model,
        {
            id(tensor): torch.empty(shapes[id(tensor)], dtype=tensor.dtype, device=tensor.device)
            for module in modules.values()
            for tensor in _own_tensors(module).values()
            if shapes.get(id(tensor), tuple(tensor.shape)) != tuple(tensor.shape)
        },
    )


def replace_tensors_(model: nn.Module, new: dict[int, torch.Tensor]) -> None:
    """Replace parameters and buffers, named by `id`; a tensor that several modules share stays shared."""
    parameters: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) in new:
                key = id(parameter)
                parameters.setdefault(key, nn.Parameter(new[key], requires_grad=parameter.requires_grad))
                module._parameters[name] = parameters[key]
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) in new:
                module._buffers[name] = new[id(buffer)]


def refresh_sizes_(module: Any) -> None:
    """Set the attributes of a layer of a known kind to the shape of its weight."""
    # the older weight_norm and spectral_norm compute `weight` only when the layer runs
    names = ("weight_orig", "weight_v", "weight")
    weight = next((found for name in names if (found := getattr(module, name, None)) is not None), None)
    if weight is None:
        return
    if isinstance(module, _ConvNd):
        if module.in_channels == module.groups > 1:  # depthwise
            module.groups = weight.shape[0] // (1 if module.transposed else module.out_channels // module.groups)
        first, second = weight.shape[0], weight.shape[1] * module.groups
        module.in_channels, module.out_channels = (first, second) if module.transposed else (second, first)
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, nn.GroupNorm):
        module.num_channels = len(weight)
    elif isinstance(module, nn.Embedding):
        module.num_embeddings, module.embedding_dim = weight.shape
    elif isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        module.normalized_shape = tuple(weight.shape)
    elif isinstance(module, _NormBase):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)


def _shapes(module: Any) -> dict[str, Shape]:
    """Return the shapes that the attributes of a layer of a known kind imply."""
    if isinstance(module, _ConvNd):
        first, second = module.out_channels, module.in_channels
        if module.transposed:
            first, second = second, first
        return {"weight": (first, second // module.groups, *module.kernel_size), "bias": (module.out_channels,)}
    if isinstance(module, nn.Linear):
        return {"weight": (module.out_features, module.in_features), "bias": (module.out_features,)}
    if isinstance(module, nn.Embedding):
        return {"weight": (module.num_embeddings, module.embedding_dim)}
    if isinstance(module, nn.PReLU):
        return {"weight": (module.num_parameters,)}
    if isinstance(module, nn.GroupNorm):
        return dict.fromkeys(("weight", "bias"), (module.num_channels,))
    if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
        return dict.fromkeys(("weight", "bias"), tuple(module.normalized_shape))
    if isinstance(module, _NormBase):
        return dict.fromkeys(("weight", "bias", "running_mean", "running_var"), (module.num_features,))
    return {}


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers that a module holds itself and a checkpoint saves."""
    saved = {k: v for k, v in module._buffers.items() if k not in module._non_persistent_buffers_set}
    return {name: tensor for name, tensor in {**module._parameters, **saved}.items() if tensor is not None}


def _is_width(value: object, known: int | list[int]) -> bool:
    """Return whether `value` is a width, or as many widths as `known` has."""
    sizes = value if isinstance(value, list) and isinstance(known, list) and len(value) == len(known) else [value]
    return all(type(size) is int and size >= 1 for size in sizes) and isinstance(value, type(known))
