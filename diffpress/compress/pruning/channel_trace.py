"""One evaluation of a network under observation: the channel ids of every tensor it computes.

A dispatch mode sees every ATen operation, so that user code needs no layers of a known kind: functional calls, raw
parameters and shared weights are followed like modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.modules.batchnorm import _NormBase
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.compress.pruning.channel_ids import ChannelIds, Ids, Labels, tensors_in
from diffpress.compress.pruning.channel_rules import ON_STATISTICS, rule_for, statistics_of

# normalization -> attribute with the number of its channels
STORED_SIZES: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.LayerNorm, "normalized_shape"),
    (nn.RMSNorm, "normalized_shape"),
    (nn.GroupNorm, "num_channels"),
    (_NormBase, "num_features"),
)
# (name of a parameter or buffer, or of a module and its stored size; dimension)
Slot = tuple[str, int]
# one operation: its name, and for every output the ids of each dimension, or its size
Step = tuple[str, list[list[Ids | int]]]


class ChannelTrace(TorchDispatchMode):
    """What one evaluation showed.

    Attributes:
        ids: The channels, coupled.
        slots: Channel ids along every dimension of every parameter and buffer.
        shares: (ids, groups, what): equally many of `ids` must be removed from each of `groups` runs.
        positions: Number of positions of the whole batch at which each weight is multiplied.
        steps: The operations in order.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, torch.Tensor], slots: Mapping[Slot, Ids] | None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        given = slots or {}
        self.ids = ChannelIds(1 + max((int(ids.max(initial=-1)) for ids in given.values()), default=-1))
        self.slots: dict[Slot, Ids] = dict(given)
        self.shares: list[tuple[Ids, int, str]] = []
        self.positions: dict[str, int] = {}
        self.steps: list[Step] = []
        self._labels: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        for tensor in inputs.values():
            self._labels[tensor] = Labels(data=True)
        for name, tensor in _state_of(model).items():
            if slots is None:
                self.slots |= {(name, d): self.ids.new(n) for d, n in enumerate(tensor.shape) if n > 1}
            own = {d: self.slots[name, d] for d in range(tensor.ndim) if (name, d) in self.slots}
            self._labels[tensor] = Labels(own, weights=frozenset([name]))
        self._first = slots is None
        if self._first:
            self._follow_adapter(model)
        self._spectral = _spectral_vectors(model)

    def _follow_adapter(self, model: nn.Module) -> None:
        """Fix the heads of attentions, which are pruned apart, and couple outputs that the family's adapter ties."""
        adapter, names = adapter_for(model), {module: name for name, module in model.named_modules()}
        for member in (member for heads in adapter.attentions(model) for member in heads.members):
            for tensor in ("weight", "bias") if member.side == "out" else ():
                self.ids.fix(self.slots.get((f"{names[member.layer]}.{tensor}", 0)), HEADS)
        for first, *others in adapter.tied_outputs(model):
            for other in others:
                self.ids.couple(self.slots[f"{first}.weight", 0], self.slots[f"{other}.weight", 0], HEADS)

    def labels(self, tensor: torch.Tensor) -> Labels:
        """Return the labels of a tensor."""
        return self._labels.get(tensor) or Labels()

    def equal_share(self, ids: Ids | None, groups: int, reason: str) -> None:
        """Require that equally many of `ids` are removed from each of `groups` runs."""
        if ids is not None and groups > 1:
            self.shares.append((ids, groups, reason))

    def evaluates(self, weights: Iterable[str], positions: int) -> None:
        """Count the positions of the whole batch at which weights are multiplied."""
        for name in weights:
            self.positions[name] = self.positions.get(name, 0) + positions

    def normalizes(self, name: str, attribute: str, module: Any, x: torch.Tensor) -> None:
        """Note the channels that a normalization without weights stores the number of."""
        if self._first:
            sizes, axes = getattr(module, attribute), self.labels(x).axes
            first = 1 if isinstance(sizes, int) else x.ndim - len(sizes)
            count = 1 if isinstance(sizes, int) else len(sizes)
            found = {(f"{name}.{attribute}", d): axes[first + d] for d in range(count) if first + d in axes}
            self.slots |= found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation and label its outputs."""
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        name = name.removesuffix("_") if func._schema.is_mutable else name
        named = [argument.name for argument in func._schema.arguments]
        arguments = {argument.name: argument.default_value for argument in func._schema.arguments}
        arguments |= dict(zip(named, args, strict=False)) | (kwargs or {})
        outputs = tensors_in([result])
        self._label(func, name, arguments, outputs)
        shapes = [[self.labels(out).axes.get(d, n) for d, n in enumerate(out.shape)] for out in outputs]
        self.steps.append((name, shapes))
        return result

    def _label(self, func: Any, name: str, arguments: Mapping[str, Any], outputs: list[torch.Tensor]) -> None:
        operands = tensors_in(arguments.values())
        before = [self.labels(operand) for operand in operands]
        if not any(labels.axes or labels.data or labels.weights for labels in before):
            return
        if name in ("mv", "dot", "vdot") and not any(labels.data for labels in before):
            self._check_weight_products(before)
        found = rule_for(func, name)(self, name, arguments, outputs)
        data = any(labels.data for labels in before)
        weights = frozenset[str]() if data else frozenset[str]().union(*(labels.weights for labels in before))
        statistics = self._statistics(name, before, found[0] if found else {})
        for out, axes in zip(outputs, found, strict=True):
            self._labels[out] = Labels(axes, data, weights, statistics + statistics_of(self, name, arguments))

    def _statistics(self, name: str, before: list[Labels], axes: dict[int, Ids]) -> tuple[Ids, ...]:
        """Return the statistics that the output still is: a normalization ends where they meet their channels."""
        carried = [ids for labels in before for ids in labels.statistics]
        if carried and name not in ON_STATISTICS:
            for ids in carried:
                self.ids.fix(ids, f"is summed over for something else than a normalization ({name})")
            return ()
        present = [self.ids.roots(ids) for ids in axes.values()]
        return tuple(ids for ids in carried if not any(np.array_equal(self.ids.roots(ids), own) for own in present))

    def _check_weight_products(self, operands: list[Labels]) -> None:
        """Fix channels that a product of weights sums over, except in a spectral norm, which is kept by a factor."""
        if not any(labels.weights & self._spectral for labels in operands):
            for labels in operands:
                for ids in labels.axes.values():
                    self.ids.fix(ids, "is summed in a product of weights")


def trace(model: nn.Module, inputs: dict[str, torch.Tensor], slots: Mapping[Slot, Ids] | None = None) -> ChannelTrace:
    """Evaluate `model` and return its channels; `slots` gives the ids of the weights of a pruned model."""
    found = ChannelTrace(model, inputs, slots)
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), without_fast_path(), _observed_norms(model, found), found:
        out = adapter_for(model).forward(model, inputs)
    for ids in found.labels(out).axes.values():
        found.ids.fix(ids, OUTPUT)
    for ids in found.labels(out).statistics:
        found.ids.fix(ids, OUTPUT)
    return found


OUTPUT = "is an output of the network"
HEADS = "belongs to the heads of an attention"


@contextmanager
def _observed_norms(model: nn.Module, found: ChannelTrace) -> Iterator[None]:
    """Report the inputs of normalizations without weights, which store the number of channels."""
    handles = [
        module.register_forward_pre_hook(lambda m, args, name=name, size=size: found.normalizes(name, size, m, args[0]))
        for name, module in model.named_modules()
        for kind, size in STORED_SIZES
        if isinstance(module, kind) and module.weight is None
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _state_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the parameters and buffers by name; a tensor with several names is listed once."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor for name, tensor in named if tensor.is_floating_point()}


def _spectral_vectors(model: nn.Module) -> frozenset[str]:
    """Return the names of the vectors from which a spectral norm is computed."""
    return frozenset(
        name for name, _ in model.named_buffers() if name.endswith(("._u", "._v", ".weight_u", ".weight_v"))
    )
