"""Parameters, multiply-accumulates (MACs) and bytes of a denoiser, counted during one evaluation.

MACs of a convolution or linear layer: output elements * weight elements per output channel. Attention products
are counted from the shapes of the executed matmuls (half of torch's FlopCounterMode count).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class Counts:
    """Parameters, MACs of one evaluation for one sample, and bytes of the fp32 weights."""

    parameters: int
    macs: int
    fp32_bytes: int


LARGE = 100_000_000  # parameters


def is_large(model: nn.Module) -> bool:
    """Return whether the model has over 100 M parameters: one evaluation takes seconds on a CPU."""
    return sum(p.numel() for p in model.parameters()) > LARGE


def count(model: nn.Module, spec: DenoiserSpec) -> Counts:
    """Count parameters, MACs and bytes of a denoiser."""
    parameters, inputs = sum(p.numel() for p in model.parameters()), dummy_inputs(spec, 1)
    if is_large(model):  # an evaluation would take many seconds; the meta device computes only shapes
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})
        inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        adapter_for(model).forward(model, inputs)
    return Counts(parameters, counter.get_total_flops() // 2, 4 * parameters)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta
