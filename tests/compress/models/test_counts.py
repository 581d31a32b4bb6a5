"""compress/models/counts.py: MACs of every kind of operation against the formula, written out by hand."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffpress.compress.models import counts
from diffpress.compress.models.counts import count
from diffpress.runtime.noise_schedule import betas_schedule
from diffpress.runtime.sampling_plan import make_plan
from diffpress.runtime.spec import DenoiserSpec

SCHEDULE = betas_schedule("linear", 50)
SPEC = DenoiserSpec("epsilon", SCHEDULE, (2, 8, 8), make_plan("ddim", 2, SCHEDULE))

N, D, HEADS = 8, 16, 4  # x [1, 8, 16] is 8 tokens of width 16
ATTENTION = 2 * N * N * D  # q k^T and its product with v
PROJECTIONS = 4 * N * D * D


class Operation(nn.Module):
    """Applies `operation(layer, x)` to x [B, 8, 16]."""

    def __init__(self, layer: nn.Module, operation: Callable[[nn.Module, Tensor], object]) -> None:
        super().__init__()
        self.layer, self._operation = layer, operation

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        self._operation(self.layer, sample.reshape(-1, N, D))
        return sample


def heads(x: Tensor) -> Tensor:
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


OPERATIONS: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], object], int]] = {
    "linear": (nn.Linear(D, 5), lambda m, x: m(x), N * D * 5),
    "conv1d": (nn.Conv1d(N, 6, 3, padding=1), lambda m, x: m(x), 6 * D * N * 3),
    "conv2d": (nn.Conv2d(8, 6, 3, groups=2), lambda m, x: m(x.view(-1, 8, 4, 4)), 6 * 2 * 2 * 4 * 9),
    "conv3d": (nn.Conv3d(2, 3, 2), lambda m, x: m(x.view(-1, 2, 4, 4, 4)), 3 * 27 * 2 * 8),
    "transposed conv1d": (nn.ConvTranspose1d(N, 6, 4, stride=2), lambda m, x: m(x), D * N * 6 * 4),
    "transposed conv2d": (nn.ConvTranspose2d(8, 6, 2, stride=2), lambda m, x: m(x.view(-1, 8, 4, 4)), 16 * 8 * 6 * 4),
    "matmul": (nn.Identity(), lambda m, x: x @ x.transpose(1, 2), N * N * D),
    "matrix times vector": (nn.Identity(), lambda m, x: x[0] @ x[0, 0], N * D),
    "dot product": (nn.Identity(), lambda m, x: x[0, 0] @ x[0, 1], D),
    "einsum": (nn.Identity(), lambda m, x: torch.einsum("bnd,bmd->bnm", x, x), N * N * D),
    "baddbmm": (nn.Identity(), lambda m, x: torch.baddbmm(x[:, :, :N], x, x.transpose(1, 2)), N * N * D),
    "addbmm": (nn.Identity(), lambda m, x: torch.addbmm(x[0, :, :N], x, x.transpose(1, 2)), N * N * D),
    "bilinear": (nn.Bilinear(D, D, 3), lambda m, x: m(x, x), N * 3 * (D * D + D)),
    "lstm": (nn.LSTM(D, 5, batch_first=True), lambda m, x: m(x), N * 4 * 5 * (D + 5)),
    "gru": (nn.GRU(D, 5, batch_first=True), lambda m, x: m(x), N * 3 * 5 * (D + 5)),
    "attention": (
        nn.Identity(),
        lambda m, x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x)),
        ATTENTION,
    ),
    "masked attention": (
        nn.Identity(),
        lambda m, x: F.scaled_dot_product_attention(heads(x), heads(x), heads(x), torch.zeros(N, N)),
        ATTENTION,
    ),
    "multi-head attention": (
        nn.MultiheadAttention(D, HEADS, batch_first=True),
        lambda m, x: m(x, x, x),
        PROJECTIONS + ATTENTION,
    ),
    "encoder layer": (
        nn.TransformerEncoderLayer(D, HEADS, 5, batch_first=True),
        lambda m, x: m(x),
        PROJECTIONS + ATTENTION + 2 * N * D * 5,
    ),
    "decoder layer": (
        nn.TransformerDecoderLayer(D, HEADS, 5, batch_first=True),
        lambda m, x: m(x, x),
        2 * (PROJECTIONS + ATTENTION) + 2 * N * D * 5,
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_the_macs_of_an_operation_are_those_of_its_formula(name: str) -> None:
    layer, operation, macs = OPERATIONS[name]
    assert count(Operation(layer, operation).eval(), SPEC).macs == macs


@pytest.mark.parametrize("name", ["attention", "encoder layer", "lstm", "conv3d"])
def test_shapes_alone_give_the_same_count(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, operation, macs = OPERATIONS[name]
    monkeypatch.setattr(counts, "LARGE", 0)  # counted on the meta device
    assert count(Operation(layer, operation).eval(), SPEC).macs == macs


def test_a_parameter_that_is_passed_to_a_module_is_counted_and_keeps_its_gradient() -> None:
    class Token(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.token, self.layer = nn.Parameter(torch.randn(1, D)), nn.Linear(D, 3)

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return sample + self.layer(self.token.expand(len(sample), -1)).sum()

    model = Token().eval()
    assert count(model, SPEC).macs == D * 3
    assert all(parameter.requires_grad for parameter in model.parameters())
