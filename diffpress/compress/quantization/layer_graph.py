"""Layer graph of a model: all that quantization must know of how its layers are connected, traced in one evaluation.

    which layers read the same tensor                     they share a smoothing vector, so that it is divided once
    which layers read a concatenation of channels         stream and skip of a U-Net may need separate scales
    which tensors hold the same values as others          they share a scale, so that engines copy integers
    the number of dimensions of a layer's input           linear layers over sequences [B, L, C] or embeddings [B, C]

The trace is a list of events in the order of execution. A concatenation is followed through operations that act on each
channel separately (normalization, activation, resampling), which finds it with the widths left by pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.layer_kinds import LAYERS, channel_axis, layer_input
from diffpress.runtime.network_inputs import dummy_inputs
from diffpress.runtime.spec import DenoiserSpec

CONCATS = (torch.cat, torch.concat, torch.concatenate)
CHANNEL_WISE = (
    *(F.group_norm, F.layer_norm, F.batch_norm, F.instance_norm),
    *(F.silu, F.relu, F.gelu, F.mish, F.leaky_relu, F.dropout, torch.tanh, torch.sigmoid, torch.relu),
    *(F.interpolate, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d),
    *(torch.Tensor.contiguous, torch.Tensor.to, torch.Tensor.float, torch.Tensor.clone),
)
# operations besides concatenation that may copy values or add zeros, with their parameters by position
COPIES: dict[Any, tuple[str, ...]] = {
    F.interpolate: ("input", "size", "scale_factor", "mode"),
    F.pad: ("input", "pad", "mode", "value"),
}


class Event(NamedTuple):
    """One event of the trace; tensors are numbered.

    Attributes:
        key: '<layer>.input' where a layer reads `tensor`, '<module>.output' where a module returns it, '' where an
            operation copies the values of `sources` into it.
        tensor: The tensor.
        sources: Tensors that are copied.
    """

    key: str
    tensor: int
    sources: tuple[int, ...] = ()


@dataclass(frozen=True)
class LayerGraph:
    """How the layers of a model are connected.

    Attributes:
        events: Reads of layers, outputs of modules and copies of values, in the order of execution.
        ranks: Layer that ran -> number of dimensions of its input.
        concats: Layer -> channel counts of the tensors concatenated in its input.
    """

    events: tuple[Event, ...]
    ranks: dict[str, int]
    concats: dict[str, tuple[int, ...]]

    def shared_inputs(self, layers: Iterable[str]) -> list[list[str]]:
        """Group `layers` by the tensor they read; one that does not run is its own group."""
        group = {layer: [layer] for layer in layers}
        readers: dict[int, str] = {}
        for event in self.events:
            layer, _, side = event.key.rpartition(".")
            if side == "input" and layer in group:
                other = group[readers.setdefault(event.tensor, layer)]
                if other is not group[layer]:
                    other += group[layer]
                    group.update(dict.fromkeys(other, other))
        return [members for layer, members in group.items() if members[0] == layer]


def trace_layer_graph(model: nn.Module, spec: DenoiserSpec) -> LayerGraph:
    """Trace the layer graph of a denoiser in one evaluation on random inputs."""
    network = TorchNetwork(model, spec)
    return layer_graph(model, lambda: network.run(dummy_inputs(network, spec, 1)))


def layer_graph(model: nn.Module, evaluate: Callable[[], object]) -> LayerGraph:
    """Trace the layer graph of any module while `evaluate` runs it."""
    tracer = _Tracer()
    with ExitStack() as stack:
        for name, module in model.named_modules():
            stack.callback(module.register_forward_hook(partial(tracer.on_output, f"{name}.output")).remove)
            if isinstance(module, LAYERS):
                hook = partial(tracer.on_input, name)
                stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        stack.enter_context(tracer)
        evaluate()
    return LayerGraph(tuple(tracer.events), tracer.ranks, tracer.concats)


class _Tracer(TorchFunctionMode):
    """Records events, and follows concatenations through channel-wise operations."""

    def __init__(self) -> None:
        super().__init__()
        self.events: list[Event] = []
        self.ranks: dict[str, int] = {}
        self.concats: dict[str, tuple[int, ...]] = {}
        self._count = 0
        self._numbers = WeakIdKeyDictionary()  # live tensor -> its number
        self._joined = WeakIdKeyDictionary()  # live tensor that holds a concatenation -> its axis and widths

    def on_input(self, layer: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = layer_input(args, kwargs)
        self.events.append(Event(f"{layer}.input", self._number(x)))
        self.ranks[layer] = x.dim()
        axis, widths = self._joined.get(x, (None, ()))
        if axis == channel_axis(module) % x.dim():
            self.concats[layer] = widths

    def on_output(self, key: str, module: nn.Module, args: object, out: Any) -> None:
        first = out[0] if isinstance(out, tuple) else out
        if isinstance(first, torch.Tensor):
            self.events.append(Event(key, self._number(first)))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func in CONCATS:
            tensors, axis = _concatenated(*args, **kwargs)
            self._copy(tensors, out)
            axis %= out.dim()
            self._joined[out] = axis, tuple(tensor.shape[axis] for tensor in tensors)
        elif func in COPIES and _copies_values(func, arguments := _by_name(COPIES[func], args, kwargs)):
            self._copy([arguments["input"]], out)
        if func in CHANNEL_WISE and args and args[0] in self._joined:
            self._joined[out] = self._joined[args[0]]
        return out

    def _copy(self, sources: Iterable[torch.Tensor], out: torch.Tensor) -> None:
        self.events.append(Event("", self._number(out), tuple(map(self._number, sources))))

    def _number(self, tensor: torch.Tensor) -> int:
        if tensor not in self._numbers:
            self._numbers[tensor] = self._count
            self._count += 1
        return int(self._numbers[tensor])


def _concatenated(tensors: Any, dim: int = 0, *, axis: int | None = None, out: None = None) -> tuple[Any, int]:
    """Return the tensors and the axis from the arguments of one of CONCATS."""
    return tensors, dim if axis is None else axis


def _by_name(names: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def _copies_values(func: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether one of COPIES only copies values: nearest-neighbour resampling, or padding with zeros."""
    if func is F.interpolate:
        return bool(arguments.get("mode", "nearest") == "nearest")
    return bool(arguments.get("mode", "constant") == "constant" and not arguments.get("value"))
