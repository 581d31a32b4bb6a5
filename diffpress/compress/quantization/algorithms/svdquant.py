"""SVDQuant: a low-rank float branch beside a quantized linear layer (Li et al. 2025, section 4.2).

    y = w x = q(r diag(s)) q(x / s) + up (down x),    r = w - up down,    up [out, rank], down [rank, in]

q is the layer's quantization and s its smoothing vector, if it has one. up (down diag(s)) is the best approximation of
w diag(s) of this rank, from its SVD (modelopt's `svd`). The residual is smaller than the weight, so its scales are
finer. The checkpoint keeps w; down and up are stored with the scales.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS

Tensors = dict[str, torch.Tensor]


def with_svdquant(model: nn.Module, scales: Quantization, rank: int) -> Quantization:
    """Add a branch of this rank to `scales` for every linear layer in the stage's format whose rank is larger."""
    from modelopt.torch.quantization.model_calib import svd

    svdquant: Tensors = {}
    amax = {key: value.clone() for key, value in scales.amax.items()}
    for name in scales.layers:
        layer = model.get_submodule(name)
        if not isinstance(layer, nn.Linear) or name in scales.formats or min(layer.weight.shape) <= rank:
            continue
        smooth = scales.smooth.get(name, torch.ones(layer.in_features))
        weight, form = layer.weight.detach().float().cpu() * smooth, FORMATS[scales.format]
        up, down = svd(weight, rank)
        svdquant |= {f"{name}.down": (down / smooth).contiguous(), f"{name}.up": up.contiguous()}
        # scaling the amax keeps the factor of reduce_range
        amax[f"{name}.weight"] *= weight_amax(weight - up @ down, form) / weight_amax(weight, form)
    return replace(scales, amax=amax, svdquant=svdquant)


def product(scales: Quantization, layer: str) -> torch.Tensor | float:
    """Return up @ down [out, in] of a layer's branch, or 0 if it has none."""
    return (
        scales.svdquant[f"{layer}.up"] @ scales.svdquant[f"{layer}.down"] if f"{layer}.up" in scales.svdquant else 0.0
    )


def attach_svdquant_(model: nn.Module, scales: Quantization) -> None:
    """Replace the weights of the quantized layers of `model` by their residuals, and add the low-rank branches."""
    for key in scales.svdquant:
        name, _, side = key.rpartition(".")
        if side == "up":
            layer: Any = model.get_submodule(name)
            residual = layer._parameters["weight"].detach().float() - product(scales, name)
            layer._parameters["weight"] = nn.Parameter(residual, requires_grad=False)
            layer.register_buffer("svdquant_down", scales.svdquant[f"{name}.down"])
            layer.register_buffer("svdquant_up", scales.svdquant[key])
            layer.register_forward_hook(_add_low_rank)


def _add_low_rank(layer: Any, args: tuple[torch.Tensor, ...], out: torch.Tensor) -> torch.Tensor:
    return out + F.linear(F.linear(args[0], layer.svdquant_down), layer.svdquant_up)
