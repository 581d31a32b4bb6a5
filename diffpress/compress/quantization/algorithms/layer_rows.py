"""Inputs of one layer as rows of a matrix, captured while the model runs on a batch of states.

A linear layer or convolution is  y = W x,  W [out, K], for every token or pixel: x is the token, or the patch that the
kernel covers, K = in * height * width of the kernel. A random subset of rows from every state is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.compress.quantization.layer_kinds import CONVOLUTIONS, layer_input

Visit = Callable[[str, Any, torch.Tensor], None]


def visit_layers(model: nn.Module, layers: Iterable[str], inputs: dict[str, torch.Tensor], visit: Visit) -> None:
    """Run `model` once on `inputs`, and call `visit(name, layer, x)` before the first forward of each of `layers`.

    Changes that `visit` makes to the layer's weight take effect in the same forward pass.
    """
    modules = dict(model.named_modules())
    seen: set[str] = set()

    def hook(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if name not in seen:
            seen.add(name)
            visit(name, layer, layer_input(args, kwargs))

    with ExitStack() as stack, torch.no_grad(), without_fast_path():
        for name in layers:
            stack.callback(modules[name].register_forward_pre_hook(partial(hook, name), with_kwargs=True).remove)
        adapter_for(model).forward(model, inputs)


def rows_of(layer: Any, x: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    """Return about `count` rows of x, float32 [groups, rows, K], equally many per state; a linear layer is 1 group."""
    each = max(1, count // len(x))
    if not isinstance(layer, CONVOLUTIONS):
        return torch.cat([_sampled(state.reshape(-1, state.shape[-1]), each, generator) for state in x])[None].float()
    rows = torch.cat(
        [_sampled(_patches(layer, state), each, generator) for state in x]
    ).float()  # unfold one state at a time
    return rows.unflatten(1, (layer.groups, -1)).transpose(0, 1)


def quadratic(error: torch.Tensor, products: torch.Tensor) -> float:
    """Return the output error of weight errors [out, K]: the sum over rows e of e^T H e, H = x^T x [K, K]."""
    return float(((error @ products) * error).sum())


def _patches(layer: Any, state: torch.Tensor) -> torch.Tensor:
    """Return the patches [rows, K] that the kernel of a 1d, 2d or 3d convolution covers in `state` [C, ...]."""
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    windows = F.pad(state[None], layer._reversed_padding_repeated_twice, mode)[0]
    dims = len(layer.kernel_size)
    for axis, (size, dilation, stride) in enumerate(
        zip(layer.kernel_size, layer.dilation, layer.stride, strict=True), start=1
    ):
        windows = windows.unfold(axis, dilation * (size - 1) + 1, stride)[..., ::dilation]
    rows = windows.movedim(0, dims)  # [*positions, C, *kernel]
    return rows.flatten(dims).flatten(0, dims - 1)


def _sampled(rows: torch.Tensor, count: int, generator: torch.Generator) -> torch.Tensor:
    return rows[torch.randperm(len(rows), generator=generator)[:count].to(rows.device)]
