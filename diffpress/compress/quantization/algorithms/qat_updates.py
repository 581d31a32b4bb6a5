"""What QAT trains: every parameter, or low-rank factors beside frozen weights.

    full        W, and all other parameters
    low_rank    W = W_0 + B A, of each quantized layer      EfficientDM (He et al. 2023); training/low_rank.py

After training the factors are merged into W.

Before each forward pass the quantizers follow the weights: an amax is the largest magnitude of its channel or block,
times the ratio it had before training, 1 or `reduce_range`'s 127/64.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn

from diffpress.compress.checkpoint import Quantization
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.formats import FORMATS, Format
from diffpress.compress.quantization.quantizers import quantizer_amax
from diffpress.compress.training.low_rank import LowRankUpdates, evaluate_with

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Scaling:
    """Rule for a layer's weight amax: the largest magnitudes of weight * smooth, times `proportion`."""

    form: Format
    proportion: torch.Tensor
    smooth: torch.Tensor

    def amax(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the amax, float32 [out] or [out, blocks, ...], on the weight's device."""
        found = weight_amax(weight.detach() * self.smooth.to(weight.device), self.form)
        return found * self.proportion.to(weight.device)


def weight_scalings(model: nn.Module, scales: Quantization) -> dict[str, Scaling]:
    """Return, per layer, the rule that gives the amax in `scales` from the weights of `model`."""
    found = {}
    for name in scales.layers:
        layer, form = model.get_submodule(name), FORMATS[scales.format_of(name)]
        smooth = along(scales.smooth[name], layer) if name in scales.smooth else torch.ones(())
        largest = weight_amax(_weight(layer).cpu() * smooth, form)
        found[name] = Scaling(form, scales.amax[f"{name}.weight"] / largest, smooth)
    return found


class Full(nn.Module):
    """The quantized model with all parameters trained."""

    def __init__(self, base: nn.Module, scaling: Mapping[str, Scaling]) -> None:
        super().__init__()
        self.base, self._scaling = base, scaling

    def forward(self, inputs: Tensors) -> torch.Tensor:
        """Return the output for inputs by name."""
        follow_(self.base, self._scaling, weights_of(self.base, self._scaling))
        return adapter_for(self.base).forward(self.base, inputs)

    def merged(self) -> nn.Module:
        """Return the trained model, with quantizers updated to its weights."""
        follow_(self.base, self._scaling, weights_of(self.base, self._scaling))
        return self.base


class LowRank(LowRankUpdates):
    """Low-rank training: only the factors are parameters; the frozen quantized `base` runs with the updated weights."""

    def __init__(self, base: nn.Module, scaling: Mapping[str, Scaling], rank: int, generator: torch.Generator) -> None:
        super().__init__(weights_of(base, scaling), rank, generator)
        self._scaling, self._base = scaling, [base.requires_grad_(False)]  # a list hides the submodule

    @property
    def base(self) -> nn.Module:
        """The frozen quantized model."""
        return self._base[0]

    def forward(self, inputs: Tensors) -> torch.Tensor:
        """Return the output for inputs by name."""
        weights = self._weights()
        follow_(self.base, self._scaling, weights)
        return evaluate_with(self.base, {f"{name}.weight": weight for name, weight in weights.items()}, inputs)

    def merged(self) -> nn.Module:
        """Merge the factors into the weights of the base model, update its quantizers, and return it."""
        weights = self._weights()
        follow_(self.base, self._scaling, weights)
        with torch.no_grad():
            for name, old in weights_of(self.base, self._scaling).items():
                old.copy_(weights[name])
        return self.base

    def _weights(self) -> Tensors:
        return self.updated(weights_of(self.base, self._scaling))


def weights_of(model: nn.Module, layers: Mapping[str, Scaling]) -> Tensors:
    """Return the layers' float weights; the `weight` attribute of a modelopt layer may be the quantized one."""
    return {name: _weight(model.get_submodule(name)) for name in layers}


def _weight(layer: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, layer._parameters["weight"])


def follow_(model: nn.Module, scaling: Mapping[str, Scaling], weights: Tensors) -> None:
    """Set the amax of every weight quantizer of `model` to that of `weights`."""
    for name, rule in scaling.items():
        layer: Any = model.get_submodule(name)
        layer.weight_quantizer.amax = quantizer_amax(rule.amax(weights[name]), layer)
