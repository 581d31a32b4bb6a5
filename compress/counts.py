"""Parameters, multiply-accumulates and bytes of a denoiser, counted on one real forward.

MACs of a convolution or linear layer: output elements * weight elements per output channel. Attention products
are counted from the executed matmuls' shapes (torch's own flop counter, halved).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from compress.adapters import adapter_for, example_inputs
from runtime.spec import DenoiserSpec


@dataclass(frozen=True)
class Counts:
    """Of one sample: parameters, multiply-accumulates of one denoiser call, bytes of the fp32 weights."""

    parameters: int
    macs: int
    fp32_bytes: int


def count(model: nn.Module, spec: DenoiserSpec) -> Counts:
    parameters = sum(p.numel() for p in model.parameters())
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        adapter_for(model).forward(model, example_inputs(spec, 1))
    return Counts(parameters, counter.get_total_flops() // 2, 4 * parameters)
