"""Parameters, multiply-accumulates and bytes of a denoiser, counted on one real forward.

MACs of a convolution or linear layer: output elements * weight elements per output channel. Attention products
are counted from the executed matmuls' shapes (torch's own flop counter, halved).
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
    """Of one sample: parameters, multiply-accumulates of one denoiser call, bytes of the fp32 weights."""

    parameters: int
    macs: int
    fp32_bytes: int


LARGE = 100_000_000  # parameters


def is_large(model: nn.Module) -> bool:
    """Whether one call of it takes seconds on a processor, and its weights count against the machine's memory."""
    return sum(p.numel() for p in model.parameters()) > LARGE


def count(model: nn.Module, spec: DenoiserSpec) -> Counts:
    parameters, inputs = sum(p.numel() for p in model.parameters()), dummy_inputs(spec, 1)
    if is_large(model):  # a call would take many seconds: on the meta device only the shapes are worked out
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
