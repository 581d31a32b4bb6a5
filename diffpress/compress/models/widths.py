"""Per-layer widths as JSON: rebuild a pruned module from the unpruned config, without pickle.

    {"down_blocks.0.resnets.0.conv1": {"in_channels": 48, "out_channels": 40}, ...}

`changed_widths` lists the layers that differ from the unpruned module; `apply_widths_` resizes a freshly built module,
whose weights are then loaded from safetensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from diffpress.runtime.errors import InvalidInputError

# layer type -> attributes that determine the shapes of its parameters
SHAPED: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv1d, ("in_channels", "out_channels", "groups")),
    (nn.Conv2d, ("in_channels", "out_channels", "groups")),
    (nn.Linear, ("in_features", "out_features")),
    (nn.GroupNorm, ("num_channels", "num_groups")),
    (nn.Embedding, ("num_embeddings", "embedding_dim")),
)

Widths = dict[str, dict[str, int]]


def layer_widths(module: nn.Module) -> dict[str, int] | None:
    """Return the width attributes of a layer, or the heads of an attention; None for other modules."""
    for kind, names in SHAPED:
        if isinstance(module, kind):
            return {name: int(getattr(module, name)) for name in names}
    heads = getattr(module, "heads", None)
    return {"heads": heads} if isinstance(heads, int) else None


def widths_of(model: nn.Module) -> Widths:
    """Return the widths of all layers by name."""
    found = {name: layer_widths(module) for name, module in model.named_modules()}
    return {name: widths for name, widths in found.items() if widths is not None}


def refuse_unrecorded(model: nn.Module, shapes: dict[str, torch.Size]) -> None:
    """Raise InvalidInputError if a parameter's shape differs from `shapes` in a layer type not in `SHAPED`."""
    recorded = tuple(kind for kind, _ in SHAPED)
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        owner = modules[name.rpartition(".")[0]]
        if parameter.shape != shapes[name] and not isinstance(owner, recorded):
            raise InvalidInputError(
                f"prune: layer '{name.rpartition('.')[0]}' is a {type(owner).__name__}, whose widths cannot be saved; "
                f"supported layers: {', '.join(kind.__name__ for kind in recorded)}"
            )


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
    for name, new in widths.items():
        module = modules.get(name)
        known = layer_widths(module) if module is not None else None
        if module is None or known is None or not isinstance(new, dict) or set(known) != set(new):
            raise InvalidInputError(f"{where}: widths name a layer '{name}' that this model does not have")
        if not all(isinstance(width, int) and width >= 1 for width in new.values()):
            raise InvalidInputError(f"{where}: layer '{name}' has a width that is not a positive integer")
        for attribute, value in new.items():
            setattr(module, attribute, value)
        _reshape_parameters_(module)


def _reshape_parameters_(module: Any) -> None:
    shapes: dict[str, tuple[int, ...]] = {}
    if isinstance(module, (nn.Conv1d, nn.Conv2d)):
        shapes["weight"] = (module.out_channels, module.in_channels // module.groups, *module.kernel_size)
        shapes["bias"] = (module.out_channels,)
    elif isinstance(module, nn.Linear):
        shapes["weight"], shapes["bias"] = (module.out_features, module.in_features), (module.out_features,)
    elif isinstance(module, nn.GroupNorm):
        shapes["weight"] = shapes["bias"] = (module.num_channels,)
    elif isinstance(module, nn.Embedding):
        shapes["weight"] = (module.num_embeddings, module.embedding_dim)
    for name, shape in shapes.items():
        old = getattr(module, name)
        if old is not None and tuple(old.shape) != shape:
            setattr(module, name, nn.Parameter(torch.empty(shape, dtype=old.dtype, device=old.device)))
