"""Where a network is split for a step cache, and its torch forward with features: hooks around the model's own blocks.

    cut.start ''       feature = input of `end`                                  the input of a U-Net's up block
    cut.start S        feature = input of `end` - input of S                     the residual of a transformer's middle

A full evaluation returns the features; a cached one puts them in the place of what the blocks before `end` compute. In
torch the replaced blocks still run, and what they return is not used: torch is the reference, engines leave them out
(export/passes/cut_graph.py). A transformer adds the residual in full evaluations as well, so that both evaluations have
the same sum.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import nn

from diffpress.runtime.caching.features import FEATURE
from diffpress.runtime.errors import InvalidInputError

STREAMS = ("hidden_states", "encoder_hidden_states")  # of transformers that also compute on the text

Tensors = dict[str, torch.Tensor]
Forward = Callable[[nn.Module, Tensors], torch.Tensor]


class Cut(NamedTuple):
    """A place to split a network.

    Attributes:
        end: The first module after the blocks that are left out.
        start: The first of the blocks that are left out, if their residual is reused; '' for the value itself.
        arguments: Parameters of the modules' forward that are reused, one feature each.
    """

    end: str
    start: str = ""
    arguments: tuple[str, ...] = ("hidden_states",)

    @property
    def features(self) -> list[str]:
        """Names of the features."""
        return [f"{FEATURE}{index}" for index in range(len(self.arguments))]


def check_cut(cuts: Sequence[str], name: str, family: str, able: Sequence[str]) -> str:
    """Return the name if it is one of the cuts; the first one for ''.

    Raises:
        InvalidInputError: The model has no such cut, or none.
    """
    if not cuts:
        raise InvalidInputError(
            f"step cache of kind 'features': this {family} has no cut; use kind 'forecast', which every network has "
            f"(families with cuts: {', '.join(able)})"
        )
    if name and name not in cuts:
        raise InvalidInputError(f"step cache: cut '{name}' is not one of {', '.join(cuts)}, which this {family} has")
    return name or cuts[0]


def split_forward(
    model: nn.Module, forward: Forward, cut: Cut, inputs: Tensors, features: Sequence[torch.Tensor] | None = None
) -> tuple[torch.Tensor, ...]:
    """Evaluate a network and return its output, followed by its features.

    Args:
        model: The network.
        forward: Evaluates it on inputs by name.
        cut: Where it is split.
        inputs: Its inputs.
        features: Features of an earlier evaluation, for a cached evaluation; they are also returned.
    """
    modules = dict(model.named_modules())
    started: list[torch.Tensor] = []
    used: list[torch.Tensor] = []

    def at_start(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        started[:] = [_argument(module, name, args, kwargs) for name in cut.arguments]

    def at_end(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        values = [_argument(module, name, args, kwargs) for name in cut.arguments]
        if features is not None:
            used[:] = list(features)
        elif cut.start:
            used[:] = [value - first for value, first in zip(values, started, strict=True)]
        else:
            used[:] = values
        sums = [first + one for first, one in zip(started, used, strict=True)] if cut.start else used
        for name, value in zip(cut.arguments, sums, strict=True):
            args, kwargs = _with_argument(module, name, value, args, kwargs)
        return args, kwargs

    with ExitStack() as stack:
        if cut.start:
            stack.callback(modules[cut.start].register_forward_pre_hook(at_start, with_kwargs=True).remove)
        stack.callback(modules[cut.end].register_forward_pre_hook(at_end, with_kwargs=True).remove)
        out = forward(model, inputs)
    return out, *used


def _position(module: nn.Module, name: str) -> int:
    return list(inspect.signature(module.forward).parameters).index(name)


def _argument(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    value: torch.Tensor = kwargs[name] if name in kwargs else args[_position(module, name)]
    return value


def _with_argument(
    module: nn.Module, name: str, value: torch.Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if name in kwargs:
        return args, {**kwargs, name: value}
    index = _position(module, name)
    return (*args[:index], value, *args[index + 1 :]), kwargs
