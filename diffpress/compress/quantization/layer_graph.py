"""Layer graph of a model, traced in one evaluation: shared inputs and concatenations.

A concatenation of channels is followed through operations that act on each channel separately: normalization,
activation, resampling. This finds the concatenations of stream and skip in a U-Net, with the widths left by pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.network_inputs import dummy_inputs

CONCATS = (torch.cat, torch.concat, torch.concatenate)
CHANNEL_WISE = (
    *(F.group_norm, F.layer_norm, F.batch_norm, F.instance_norm),
    *(F.silu, F.relu, F.gelu, F.mish, F.leaky_relu, F.dropout, torch.tanh, torch.sigmoid, torch.relu),
    *(F.interpolate, F.avg_pool2d, F.max_pool2d),
    *(torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float, torch.Tensor.clone),
)


@dataclass(frozen=True)
class LayerGraph:
    """Layers with a common input, and layers that read a concatenation.

    Attributes:
        groups: Layers that read the same tensor; every layer is in one group.
        parts: Layer -> channel counts of the tensors concatenated in its input.
    """

    groups: list[list[str]]
    parts: dict[str, tuple[int, ...]]


def trace_layer_graph(checkpoint: Checkpoint, layers: Iterable[str]) -> LayerGraph:
    """Trace how the inputs of `layers` are related, in one evaluation; a layer that does not run is its own group."""
    model = checkpoint.shared_model()
    network, concats = TorchNetwork(model, checkpoint.spec), _ConcatTracker()
    group = {layer: [layer] for layer in layers}
    parts: dict[str, tuple[int, ...]] = {}
    readers: Any = WeakTensorKeyDictionary()

    def record_input(layer: str, module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        x = args[0]
        other = group[readers.setdefault(x, layer)]
        if other is not group[layer]:
            other += group[layer]
            group.update(dict.fromkeys(other, other))
        axis, widths = concats.joined.get(x, (None, ()))
        if axis == channel_axis(module) % x.dim():
            parts[layer] = widths

    with ExitStack() as stack:
        for layer in group:
            hook: Callable[..., None] = lambda module, args, layer=layer: record_input(layer, module, args)  # noqa: E731
            stack.callback(model.get_submodule(layer).register_forward_pre_hook(hook).remove)
        stack.enter_context(concats)
        network.run(dummy_inputs(network, checkpoint.spec, 1))
    return LayerGraph([members for layer, members in group.items() if members[0] == layer], parts)


def channel_axis(layer: nn.Module) -> int:
    """Return the channel axis of the layer's input."""
    return 1 if isinstance(layer, nn.Conv2d) else -1


class _ConcatTracker(TorchFunctionMode):
    """Maps every live tensor that is a concatenation to its axis and widths."""

    def __init__(self) -> None:
        super().__init__()
        self.joined: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in CONCATS:
            tensors, axis = joined(*args, **(kwargs or {}))
            axis %= out.dim()
            self.joined[out] = axis, tuple(tensor.shape[axis] for tensor in tensors)
        elif func in CHANNEL_WISE and args[0] in self.joined:
            self.joined[out] = self.joined[args[0]]
        return out


def joined(tensors: Any, dim: int = 0, *, axis: int | None = None, out: None = None) -> tuple[Any, int]:
    """Return the tensors and the axis from the arguments of one of CONCATS."""
    return tensors, dim if axis is None else axis
