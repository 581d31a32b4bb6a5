"""A U-Net's trunk on integers: the sums that its blocks end in are rounded, and tensors that are joined share a scale.

    x' = q(x + branch(x))             what the next block, a skip and an up- or downsampling read is 8 bits wide
    cat(q_s(a), q_s(b))               with one scale s for a and b, an engine copies integers

Scales are shared by whole classes: a and b of every concatenation, what comes out of it or of an upsampling, and the
inputs of layers that read one of those as it is. Their amax is the largest of the class. Which tensors these are is
read from one call of the network.
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

# what gives out the values that it gets, and zeros, beside concatenations; parameters by position
PARAMETERS: dict[Any, tuple[str, ...]] = {
    F.interpolate: ("input", "size", "scale_factor", "mode"),
    F.pad: ("input", "pad", "mode", "value"),
}

Scales = dict[str, torch.Tensor]


def unify_scales(checkpoint: Checkpoint, amax: Mapping[str, torch.Tensor]) -> Scales:
    """`amax` ('<module>.output', '<layer>.input', ...) with the largest of a class for all of the class.

    A concatenation of which one tensor is not rounded joins nothing.
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
    """Follows tensors that have a name through what does not change their values, and unites the names that meet."""

    def __init__(self) -> None:
        super().__init__()
        self._names = WeakIdKeyDictionary()  # tensor -> name of a member of its class
        self._parents: dict[str, str] = {}

    def hooks(self, name: str, module: nn.Module, amax: Mapping[str, torch.Tensor]) -> list[Any]:
        """Hooks that name the output of `module`, and what it reads, where they have a scale."""
        added = []
        if f"{name}.input" in amax:
            added.append(module.register_forward_pre_hook(lambda _, args: self._reads(args[0], f"{name}.input")))
        if f"{name}.output" in amax:
            added.append(module.register_forward_hook(lambda _, args, out: self._writes(out, f"{name}.output")))
        return added

    def classes(self) -> list[list[str]]:
        members: dict[str, list[str]] = {}
        for name in self._parents:
            members.setdefault(self._first(name), []).append(name)
        return list(members.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONCATS:
            self._joins(joined(*args, **(kwargs or {}))[0], out)
        elif func in PARAMETERS:
            arguments = dict(zip(PARAMETERS[func], args, strict=False)) | (kwargs or {})
            zeros = arguments.get("mode", "constant") == "constant" and not arguments.get("value")
            if (func is F.interpolate and arguments.get("mode", "nearest") == "nearest") or (func is F.pad and zeros):
                self._joins([arguments["input"]], out)
        return out

    def _writes(self, out: Any, name: str) -> None:
        self._names[out[0] if isinstance(out, tuple) else out] = name

    def _reads(self, tensor: torch.Tensor, name: str) -> None:
        if tensor in self._names:
            self._unite(self._names[tensor], name)

    def _joins(self, tensors: Any, out: torch.Tensor) -> None:
        names = [self._names.get(tensor) for tensor in tensors]
        if names and None not in names:
            for name in names:
                self._unite(names[0], name)
            self._names[out] = names[0]

    def _unite(self, a: str, b: str) -> None:
        self._parents.setdefault(a, a)
        self._parents.setdefault(b, b)
        self._parents[self._first(b)] = self._first(a)

    def _first(self, name: str) -> str:
        while self._parents[name] != name:
            name = self._parents[name]
        return name
