"""Parameters, multiply-accumulates (MACs) and bytes of a denoiser, counted during one evaluation.

    convolution, linear layer   output elements * weight elements per output channel
    transposed convolution      input elements * weight elements per input channel
    matmul, einsum, attention   rows * inner size * columns of every product

They are counted from the shapes of the executed operations: half of torch's FlopCounterMode count. FLOPS has those that
the counter does not know.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from diffpress.compress.models.adapter import adapter_for, dummy_inputs
from diffpress.compress.models.fast_path import without_fast_path
from diffpress.runtime.spec import DenoiserSpec

Shape = Sequence[int]


@dataclass(frozen=True)
class Counts:
    """Parameters, MACs of one evaluation for one sample, and bytes of the fp32 weights."""

    parameters: int
    macs: int
    fp32_bytes: int


LARGE = 100_000_000  # parameters


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def is_large(model: nn.Module) -> bool:
    """Return whether the model has over 100 M parameters: one evaluation takes seconds on a CPU."""
    return parameter_count(model) > LARGE


def count(model: nn.Module, spec: DenoiserSpec) -> Counts:
    """Count parameters, MACs and bytes of a denoiser."""
    parameters, inputs = parameter_count(model), dummy_inputs(spec, 1)
    if is_large(model):  # an evaluation would take many seconds; the meta device computes only shapes
        tensors = [*model.parameters(), *model.buffers()]
        model = copy.deepcopy(model, {id(tensor): _on_meta(tensor) for tensor in tensors})
        inputs = {name: tensor.to("meta") for name, tensor in inputs.items()}
    counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
    with torch.no_grad(), without_fast_path(), _without_gradients(model), counter:
        adapter_for(model).forward(model, inputs)
    return Counts(parameters, counter.get_total_flops() // 2, 4 * parameters)


@contextmanager
def _without_gradients(model: nn.Module) -> Iterator[None]:
    """Keep the counter, which tracks gradients even without autograd, from parameters that are passed to modules."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in trained:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_()


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    meta = tensor.detach().to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)
    return nn.Parameter(meta, requires_grad=False) if isinstance(tensor, nn.Parameter) else meta


# --- operations that FlopCounterMode does not know: FLOPs (two per MAC) from the shapes of their arguments -----------


def _flops_of_vectors(a: Shape, *others: Any, **settings: Any) -> int:
    return 2 * prod(a)


def _flops_of_added_vectors(bias: Shape, a: Shape, *others: Any, **settings: Any) -> int:
    return 2 * prod(a)


def _flops_of_added_products(bias: Shape, a: Shape, b: Shape, *others: Any, **settings: Any) -> int:
    return 2 * prod(a) * b[-1]


def _flops_of_attention(query: Shape, key: Shape, value: Shape, *others: Any, **settings: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _flops_of_conv_tbc(x: Shape, weight: Shape, *others: Any, out_shape: Shape, **settings: Any) -> int:
    return 2 * out_shape[0] * out_shape[1] * prod(weight)


def _flops_of_lstm(x: Shape, w_input: Shape, w_hidden: Shape, *others: Any, **settings: Any) -> int:
    return 2 * prod(x[:-1]) * (prod(w_input) + prod(w_hidden))


def _flops_of_bilinear(a: Shape, weight: Shape, b: Shape, *others: Any, **settings: Any) -> int:
    """Two products a W b of vectors, for every output of nn.Bilinear."""
    rows, (out, first, second) = prod(a[:-1]), weight
    return 2 * rows * out * (first * second + second)


aten = torch.ops.aten
FLOPS: dict[Any, Callable[..., int]] = {
    aten.mv: _flops_of_vectors,
    aten.dot: _flops_of_vectors,
    aten.vdot: _flops_of_vectors,
    aten.addmv: _flops_of_added_vectors,
    aten.addbmm: _flops_of_added_products,
    aten.conv_tbc: _flops_of_conv_tbc,
    aten.mkldnn_rnn_layer: _flops_of_lstm,
    aten._trilinear: _flops_of_bilinear,
    aten._scaled_dot_product_flash_attention_for_cpu: _flops_of_attention,
}
