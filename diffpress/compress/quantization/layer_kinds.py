"""Kinds of layers that can be quantized, and the reasons why a layer of these kinds stays in float.

    conv      Conv1d, Conv2d, Conv3d
    linear    Linear

A layer is quantized where it runs: modelopt quantizes its input and its weight around its own forward, and the ONNX
graph has one node that applies its weight. This holds if torch's forward is not overridden, the weight is a parameter
(not computed by a parametrization) and the layer is called. nn.MultiheadAttention, for example, never calls its
out_proj: it reads the weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "linear": (nn.Linear,),
}
LAYERS = tuple(kind for kinds in KINDS.values() for kind in kinds)
CONVOLUTIONS = KINDS["conv"]
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
FORWARD = ("forward", "_conv_forward")  # methods that define what torch's layers compute

NOT_CALLED = "its forward is not called"
ALL_ZERO = "its weight or its input is always zero"


def torch_class(layer: nn.Module) -> type[nn.Module]:
    """Return the class of LAYERS that `layer` is an instance of; its own if there is none."""
    return next((kind for kind in LAYERS if isinstance(layer, kind)), type(layer))


def unsupported(layer: nn.Module) -> str:
    """Return why a layer of these kinds, or a transposed convolution, cannot be quantized; '' if it can."""
    if isinstance(layer, TRANSPOSED):
        return "no engine on the CPU has an integer kernel for transposed convolutions"
    kind: Any = torch_class(layer)
    own: Any = type(layer)
    overridden = any(getattr(own, name, None) is not getattr(kind, name, None) for name in FORWARD)
    if overridden or not vars(layer).keys().isdisjoint(FORWARD):
        return "it does not use torch's forward"
    if layer._parameters.get("weight") is None:
        return "its weight is computed from other parameters"
    return ""


def layer_input(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Return the input of a layer called with these arguments."""
    found: torch.Tensor = args[0] if args else kwargs["input"]
    return found


def channel_axis(layer: nn.Module) -> int:
    """Return the channel axis of the layer's input."""
    return 1 if isinstance(layer, CONVOLUTIONS) else -1
