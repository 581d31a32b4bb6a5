"""Unified scales: the residual sums of a U-Net are quantized, and concatenated tensors share a scale.

    x' = q(x + branch(x))             the next block, the skip and the up- or downsampling read 8 bits
    cat(q_s(a), q_s(b))               with one scale s for a and b, an engine copies integers

A class of tensors shares one scale: a and b of every concatenation, the result of the concatenation or of an
upsampling, and the inputs of layers that read one of these unchanged. The amax of a class is the largest of its
members. The classes are traced in one evaluation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.adapter import dummy_inputs
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.layer_graph import CONCATS, joined

# operations besides concatenation that only copy values or add zeros, with their parameters by position
PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.interpolate: ("input", "size", "scale_factor", "mode"),
    F.pad: ("input", "pad", "mode", "value"),
}

Scales = dict[str, torch.Tensor]


def unify_scales(checkpoint: Checkpoint, amax: Mapping[str, torch.Tensor]) -> Scales:
    """Return `amax` ('<module>.output', '<layer>.input', ...) with every value set to the largest of its class.

    A concatenation with a tensor that is not quantized unifies nothing.
    """
    if not any(key.endswith(".output") for key in amax):
        return dict(amax)
    flow = _Flow()
    hooks = [hook for name, module in checkpoint.model.named_modules() for hook in flow.hooks(name, module, amax)]
    inputs = {name: value.numpy() for name, value in dummy_inputs(checkpoint.spec, 1).items()}
    try:
        with flow:
            TorchNetwork(checkpoint.model, checkpoint.spec).run(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = dict(amax)
    for keys in flow.classes():
        shared = [key for key in keys if key in amax]
        found |= dict.fromkeys(shared, torch.stack([amax[key] for key in shared]).amax(0))
    return found


class _Flow(TorchFunctionMode):
    """Tracks named tensors through operations that copy values, and merges (union-find) the names that meet."""

    def __init__(self) -> None:
        super().__init__()
        self._names = WeakIdKeyDictionary()  # tensor -> name of one member of its class
        self._parents: dict[str, str] = {}

    def hooks(self, name: str, module: nn.Module, amax: Mapping[str, torch.Tensor]) -> list[Any]:
        """Register hooks that name the input and output of `module`, if they have a scale."""
        added = []
        if f"{name}.input" in amax:
            added.append(module.register_forward_pre_hook(lambda _, args: self._on_input(args[0], f"{name}.input")))
        if f"{name}.output" in amax:
            added.append(module.register_forward_hook(lambda _, args, out: self._on_output(out, f"{name}.output")))
        return added

    def classes(self) -> list[list[str]]:
        """Return the classes of names that share a scale."""
        members: dict[str, list[str]] = {}
        for name in self._parents:
            members.setdefault(self._root(name), []).append(name)
        return list(members.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONCATS:
            self._merge(joined(*args, **(kwargs or {}))[0], out)
        elif func in PARAMETERS:
            arguments = dict(zip(PARAMETERS[func], args, strict=False)) | (kwargs or {})
            zeros = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
            if (func is F.interpolate and arguments.get("mode", "nearest") == "nearest") or (func is F.pad and zeros):
                self._merge([arguments["input"]], out)
        return out

    def _on_output(self, out: Any, name: str) -> None:
        self._names[out[0] if isinstance(out, tuple) else out] = name

    def _on_input(self, tensor: torch.Tensor, name: str) -> None:
        if tensor in self._names:
            self._unite(self._names[tensor], name)

    def _merge(self, tensors: Any, out: torch.Tensor) -> None:
        names = [self._names.get(tensor) for tensor in tensors]
        if names and None not in names:
            for name in names:
                self._unite(names[0], name)
            self._names[out] = names[0]

    def _unite(self, a: str, b: str) -> None:
        self._parents.setdefault(a, a)
        self._parents.setdefault(b, b)
        self._parents[self._root(b)] = self._root(a)

    def _root(self, name: str) -> str:
        while self._parents[name] != name:
            name = self._parents[name]
        return name
