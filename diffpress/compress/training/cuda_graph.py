"""Loss and gradients of a training step as one CUDA graph: one launch instead of about a thousand.

    first step of a kind    run eagerly, since libraries select kernels and allocate memory in it
    second step             captured; its inputs and gradients become the graph's buffers
    later steps             inputs are copied to the graph's buffers, and the graph is replayed

The kind of a step is given by all drawn values that are not tensors and by the shapes and dtypes of the tensors. Small
networks are bound by launch overhead: the built-in teacher's step takes as long for 128 images as for 64.
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
    """Raise InvalidInputError if the training steps of `model` cannot be captured.

    `what` names the training in the message.
    """
    if distributed.count() > 1:
        raise InvalidInputError(
            f"{what}: 'cuda_graphs: true' supports one process only; remove it under accelerate launch"
        )
    if any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules()):
        raise InvalidInputError(f"{what}: 'cuda_graphs: true' does not support dropout; remove it")


class CapturedStep:
    """Callable that replays `step` as a CUDA graph.

    `step(*drawn)` sets the gradients of the parameters of `model` and returns the loss; so does this object.
    """

    def __init__(self, step: Callable[..., torch.Tensor], model: nn.Module) -> None:
        self._step, self._parameters = step, list(model.parameters())
        self._captured: dict[Any, _Captured | None] = {}

    def __call__(self, *drawn: Any) -> torch.Tensor:
        """Run the step on `drawn` and return the loss."""
        leaves, structure = tree_flatten(drawn)
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        signature = ((leaf.shape, leaf.dtype) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves)
        kind = (str(structure), *signature)
        if kind not in self._captured:
            self._captured[kind] = None
            return self._step(*drawn)
        captured = self._captured[kind]
        if captured is None:
            captured = self._captured[kind] = _Captured(self._step, self._parameters, drawn, tensors)
        return captured(tensors)


class _Captured:
    """The graph of one kind of step; the tensors of the captured step become its input buffers."""

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        parameters: list[nn.Parameter],
        drawn: tuple[Any, ...],
        tensors: list[torch.Tensor],
    ) -> None:
        self._inputs, self._parameters, self._graph = tensors, parameters, torch.cuda.CUDAGraph()
        for parameter in parameters:
            parameter.grad = None  # allocates the gradient in the graph's memory pool
        with torch.cuda.graph(self._graph):
            self._loss = step(*drawn)
        self._gradients = [parameter.grad for parameter in parameters]

    def __call__(self, tensors: list[torch.Tensor]) -> torch.Tensor:
        """Replay the step with `tensors` as its inputs and return the loss."""
        if tensors[0] is not self._inputs[0]:
            torch._foreach_copy_(self._inputs, tensors)
        self._graph.replay()
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            parameter.grad = gradient
        return self._loss
