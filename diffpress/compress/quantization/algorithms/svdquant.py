"""A branch of low rank in floating point beside a quantized layer: SVDQuant (Li et al. 2025, section 4.2).

    y = w x = q(r diag(s)) q(x / s) + up (down x),    r = w - up down,    up [out, rank], down [rank, in]

with q the layer's rounding and s what smooths it, if anything does. up (down diag(s)) is the best approximation of
w diag(s) that the rank allows, by its singular values (modelopt's `svd`): what is left to be rounded is smaller, and
its scales finer. The checkpoint keeps w; down and up are data beside the scales. For linear layers.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS

Tensors = dict[str, torch.Tensor]


def with_svdquant(checkpoint: Checkpoint, scales: Quantization, rank: int) -> Quantization:
    """`scales` with a branch of this rank for every linear layer in the stage's format that has a larger one."""
    from modelopt.torch.quantization.model_calib import svd

    svdquant: Tensors = {}
    amax = {key: value.clone() for key, value in scales.amax.items()}
    for name in scales.layers:
        layer = checkpoint.model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or name in scales.formats or min(layer.weight.shape) <= rank:
            continue
        smooth = scales.smooth.get(name, torch.ones(layer.in_features))
        weight, form = layer.weight.detach().float().cpu() * smooth, FORMATS[scales.format]
        up, down = svd(weight, rank)
        svdquant |= {f"{name}.down": (down / smooth).contiguous(), f"{name}.up": up.contiguous()}
        # what was added to the range stays: see reduce_range
        amax[f"{name}.weight"] *= weight_amax(weight - up @ down, form) / weight_amax(weight, form)
    return replace(scales, amax=amax, svdquant=svdquant)


def product(scales: Quantization, layer: str) -> torch.Tensor | float:
    """Up down [out, in] of a layer's branch, 0 where it has none."""
    return (
        scales.svdquant[f"{layer}.up"] @ scales.svdquant[f"{layer}.down"] if f"{layer}.up" in scales.svdquant else 0.0
    )


def attach_svdquant_(model: nn.Module, scales: Quantization) -> None:
    """Give the layers of `model`, which have quantizers, what they have left to round, and their branch beside it."""
    for key in scales.svdquant:
        name, _, side = key.rpartition(".")
        if side == "up":
            layer: Any = model.get_submodule(name)
            residual = layer._parameters["weight"].detach().float() - product(scales, name)
            layer._parameters["weight"] = nn.Parameter(residual, requires_grad=False)
            layer.register_buffer("branch_down", scales.svdquant[f"{name}.down"])
            layer.register_buffer("branch_up", scales.svdquant[key])
            layer.register_forward_hook(_add_low_rank)


def _add_low_rank(layer: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out + F.linear(F.linear(args[0], layer.branch_down), layer.branch_up)
