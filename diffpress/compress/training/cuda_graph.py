"""Loss and gradients of a training step as one CUDA graph: a single launch in the place of a thousand.

    first time a kind of step is met     as it is, for libraries choose and allocate in it
    second time                          captured: inputs and gradients have addresses of their own from then on
    from then on                         inputs are copied to their addresses, and the graph is replayed

A kind of step is told by everything drawn that is not a tensor, and by the tensors' shapes and types. Small networks
spend their time launching: the built-in teacher's step of 128 images takes as long as one of 64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten

from diffpress.compress.training import distributed
from diffpress.runtime.errors import InvalidInputError


def refuse_cuda_graph(model: nn.Module, what: str) -> None:
    """Raise InvalidInputError where a graph cannot stand for the step."""
    if distributed.count() > 1:
        raise InvalidInputError(f"{what}: 'cuda_graphs: true' is for one process; leave it out under accelerate launch")
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise InvalidInputError(f"{what}: 'cuda_graphs: true' is for networks without dropout; leave it out")


class CapturedStep:
    """`step(*drawn)` leaves gradients in the parameters of `model` and returns the loss; so does this, faster."""

    def __init__(self, step: Callable[..., torch.Tensor], model: nn.Module) -> None:
        self._step, self._parameters = step, list(model.parameters())
        self._captured: dict[Any, _Captured | None] = {}

    def __call__(self, *drawn: Any) -> torch.Tensor:
        leaves, structure = tree_flatten(drawn)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        facts = ((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        kind = (str(structure), *facts)
        if kind not in self._captured:
            self._captured[kind] = None
            return self._step(*drawn)
        captured = self._captured[kind]
        if captured is None:
            captured = self._captured[kind] = _Captured(self._step, self._parameters, drawn, tensors)
        return captured(tensors)


class _Captured:
    """The graph of one kind of step; the tensors of the step that is captured become those it reads from."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        parameters: list[nn.Parameter],
        drawn: tuple[Any, ...],
        tensors: list[torch.Tensor],
    ) -> None:
        self._inputs, self._parameters, self._graph = tensors, parameters, torch.cuda.CUDAGraph()
        for parameter in parameters:
            parameter.grad = None  # so that the graph's own is made inside of it
        with torch.cuda.graph(self._graph):
            self._loss = step(*drawn)
        self._gradients = [parameter.grad for parameter in parameters]

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        if tensors[0] is not self._inputs[0]:
            torch._foreach_copy_(self._inputs, tensors)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss
