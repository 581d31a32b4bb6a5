"""What quantization-aware training changes: every parameter, or factors of low rank beside frozen weights.

    full        W, and all other parameters
    low_rank    W = W_0 + B A,   A [rank, K], B [out, rank]       EfficientDM (He et al. 2023), LoRA (Hu et al. 2022)

for each quantized layer's weight [out, K] (a kernel counts as part of K). B starts at 0 and A at N(0, 1 / rank), so
that a first step of size e moves a weight by about e, as in full. Only A and B have gradients, moments and an average:
at rank 16 a 3x3 convolution of 128 channels trains 14 % of what it has, one of 1280 channels 1.6 %. At the end W is one
matrix again.

Before each forward the quantizers follow the weights: an amax is the largest magnitude of its channel or block, times
what it was before training, 1 or `reduce_range`'s 127/64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.func import functional_call

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS, Format
from diffpress.compress.quantization.quantizers import quantizer_amax

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scaling:
    """How a layer's weight amax comes from its weight: largest magnitudes of weight * smooth, times `proportion`."""

    form: Format
    proportion: torch.Tensor
    smooth: torch.Tensor

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """Float32 [out] or [out, blocks, ...], where the weight is."""
        found = weight_amax(weight.detach() * self.smooth.to(weight.device), self.form)
        return found * self.proportion.to(weight.device)


def scalings(model: nn.Module, scales: Quantization) -> dict[str, Scaling]:
    """By layer, how the amax in `scales` belongs to the weights of `model`."""
    found = {}
    for name in scales.layers:
        layer, form = model.get_submodule(name), FORMATS[scales.format_of(name)]
        smooth = along(scales.smooth[name], layer) if name in scales.smooth else torch.ones(())
        largest = weight_amax(_weight(layer).cpu() * smooth, form)
        found[name] = Scaling(form, scales.amax[f"{name}.weight"] / largest, smooth)
    return found


class Full(nn.Module):
    """The quantized model, all of whose parameters are trained; called with inputs by name it gives the output."""

    def __init__(self, base: nn.Module, scaling: Mapping[str, Scaling]) -> None:
        super().__init__()
        self.base, self._scaling = base, scaling

    def forward(self, inputs: Tensors) -> torch.Tensor:
        follow_(self.base, self._scaling, weights_of(self.base, self._scaling))
        return adapter_for(self.base).forward(self.base, inputs)

    def merged(self) -> nn.Module:
        """The trained model with quantizers that belong to its weights."""
        follow_(self.base, self._scaling, weights_of(self.base, self._scaling))
        return self.base


class LowRank(nn.Module):
    """The factors alone are parameters; `base`, the frozen quantized model, is called with the weights they make."""

    def __init__(self, base: nn.Module, scaling: Mapping[str, Scaling], rank: int, generator: torch.Generator) -> None:
        super().__init__()
        self._scaling, self._answer = scaling, [_Answer(base.requires_grad_(False))]  # in a list it is no submodule
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for weight in weights_of(base, scaling).values():
            k = weight[0].numel()
            r = min(rank, k, len(weight))
            self.down.append(nn.Parameter(torch.randn(r, k, generator=generator) / r**0.5))
            self.up.append(nn.Parameter(torch.zeros(len(weight), r)))

    @property
    def base(self) -> nn.Module:
        return self._answer[0].base

    def forward(self, inputs: Tensors) -> torch.Tensor:
        weights = self._weights()
        follow_(self.base, self._scaling, weights)
        return cast(torch.Tensor, functional_call(self._answer[0], _by_parameter(weights), (inputs,)))

    def merged(self) -> nn.Module:
        """The frozen model with the factors in its weights, and quantizers that belong to these."""
        weights = self._weights()
        follow_(self.base, self._scaling, weights)
        with torch.no_grad():
            for name, old in weights_of(self.base, self._scaling).items():
                old.copy_(weights[name])
        return self.base

    def _weights(self) -> Tensors:
        old = weights_of(self.base, self._scaling)
        factors = zip(old.items(), self.down, self.up, strict=True)
        return {name: weight + (up @ down).view_as(weight) for (name, weight), down, up in factors}


class _Answer(nn.Module):
    """An adapter's forward as a module's, for `functional_call` knows modules."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, inputs: Tensors) -> torch.Tensor:
        return adapter_for(self.base).forward(self.base, inputs)


def _by_parameter(weights: Tensors) -> Tensors:
    return {f"base.{name}.weight": weight for name, weight in weights.items()}


def weights_of(model: nn.Module, layers: Mapping[str, Scaling]) -> Tensors:
    """The layers' float weights: asked by its name, modelopt's layer may give the rounded one."""
    return {name: _weight(model.get_submodule(name)) for name in layers}


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer._parameters["weight"])


def follow_(model: nn.Module, scaling: Mapping[str, Scaling], weights: Tensors) -> None:
    """Give every weight quantizer of `model` the amax that belongs to `weights`."""
    for name, rule in scaling.items():
        layer: Any = model.get_submodule(name)
        layer.weight_quantizer.amax = quantizer_amax(rule.amax(weights[name]), layer)
