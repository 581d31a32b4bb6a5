"""compress/quantization/layer_kinds.py: what cannot be quantized stays in float, all at once and named in one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_kinds import unsupported
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized, quantizers_that_ran
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import dummy_inputs
from tests.compress.quantization.scales import scales_of

SETTINGS: dict[str, Any] = {"samples": 2, "batch": 2, "output_correction": False}


class Middle(nn.Module):
    """Layers between a first and a last one, which are sensitive; `ran` is a plain layer that is quantized."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.ran = nn.Linear(64, 16), nn.Linear(16, 16)
        self.odd = self.make()
        self.last = nn.Linear(16, 64)

    def make(self) -> nn.Module:
        return nn.Linear(16, 16)

    def apply_odd(self, x: Tensor) -> Tensor:
        return self.odd(x)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = torch.tanh(self.ran(torch.tanh(self.first(sample.flatten(1)))))
        return self.last(x + self.apply_odd(x)).view_as(sample)


class NotCalled(Middle):
    def apply_odd(self, x: Tensor) -> Tensor:
        return x


class WeightReadDirectly(Middle):
    def apply_odd(self, x: Tensor) -> Tensor:
        layer: Any = self.odd
        return F.linear(x, layer.weight, layer.bias)


class ZeroWeight(Middle):
    def make(self) -> nn.Module:
        layer = nn.Linear(16, 16)
        nn.init.zeros_(layer.weight)
        return layer


class ZeroInput(Middle):
    def apply_odd(self, x: Tensor) -> Tensor:
        return self.odd(torch.zeros_like(x))


class OwnForward(Middle):
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return F.linear(input, 0.5 * self.weight, self.bias)

    def make(self) -> nn.Module:
        return OwnForward.Scaled(16, 16)


class StandardizedWeight(Middle):
    class Standardized(nn.Conv1d):
        def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            return super()._conv_forward(input, weight - weight.mean(), bias)

    def make(self) -> nn.Module:
        return StandardizedWeight.Standardized(1, 1, 3, padding=1)

    def apply_odd(self, x: Tensor) -> Tensor:
        return self.odd(x[:, None])[:, 0]


class WeightNorm(Middle):
    def make(self) -> nn.Module:
        return parametrizations.weight_norm(nn.Linear(16, 16))


class SpectralNorm(Middle):
    def make(self) -> nn.Module:
        return nn.utils.spectral_norm(nn.Linear(16, 16))


class Transposed(Middle):
    def make(self) -> nn.Module:
        return nn.ConvTranspose1d(1, 1, 3, padding=1)

    def apply_odd(self, x: Tensor) -> Tensor:
        return self.odd(x[:, None])[:, 0]


REASONS = {
    NotCalled: "its forward is not called",
    WeightReadDirectly: "its forward is not called",
    ZeroWeight: "its weight or its input is always zero",
    ZeroInput: "its weight or its input is always zero",
    OwnForward: "it does not use torch's forward",
    StandardizedWeight: "it does not use torch's forward",
    WeightNorm: "its weight is computed from other parameters",
    SpectralNorm: "its weight is computed from other parameters",
    Transposed: "no engine on the CPU has an integer kernel for transposed convolutions",
}


@pytest.mark.parametrize("kind", REASONS)
def test_a_layer_that_cannot_be_quantized_stays_in_float_and_is_named_with_the_reason(
    kind: type[Middle],
    custom: Callable[..., Checkpoint],
    context: Callable[..., Context],
    output: Callable[[Checkpoint], Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = custom(kind())
    caplog.set_level("INFO", logger="diffpress")
    quantized = quantize(checkpoint, QuantizeConfig(**SETTINGS), context(checkpoint))
    assert [record.message for record in caplog.records if "kept in float" in record.message] == [
        f"kept in float: odd ({REASONS[kind]})"
    ]
    assert scales_of(quantized).layers == ["first", "last", "ran"] and "ran.input" in scales_of(quantized).amax
    assert ran(quantized) == set(scales_of(quantized).amax)
    assert 20 < sqnr_db(output(checkpoint).numpy(), output(quantized).numpy()) < 100


def ran(quantized: Checkpoint) -> set[str]:
    """Return the keys of the quantizers that run in one evaluation."""
    model = fake_quantized(quantized)
    network = TorchNetwork(model, quantized.spec)
    return quantizers_that_ran(model, lambda: network.run(dummy_inputs(network, quantized.spec, 1)))


class Quantizable(Middle):
    """The cases that look special and are quantized nevertheless."""

    class Named(nn.Linear):
        pass

    def make(self) -> nn.Module:
        layer = Quantizable.Named(16, 16)
        with torch.no_grad():
            layer.weight[3] = 0.0  # a channel of zeros has no magnitude of its own
        return layer

    def apply_odd(self, x: Tensor) -> Tensor:
        return self.odd(input=torch.tanh(self.odd(input=x)))  # called twice, with a keyword


def test_a_subclass_with_a_zero_channel_called_twice_with_keywords_is_quantized(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    for _ in range(2):  # a second class of the same name, as when a user's file is loaded again
        vars_of_class: Any = Quantizable
        vars_of_class.Named = type("Named", (nn.Linear,), {"__module__": __name__})
        checkpoint = custom(Quantizable())
        quantized = quantize(checkpoint, QuantizeConfig(**SETTINGS), context(checkpoint))
        assert {"odd.input", "odd.weight"} <= ran(quantized)
        assert (scales_of(quantized).amax["odd.weight"] > 0).all()


class Encoder(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.layer, self.last = nn.Linear(8, 16), layer, nn.Linear(16, 8)

    def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
        x = self.first(sample[:, 0])
        x = self.layer(x, x) if isinstance(self.layer, nn.TransformerDecoderLayer) else self.layer(x)
        return self.last(x[0] if isinstance(x, tuple) else x)[:, None]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("kind", [nn.TransformerEncoderLayer, nn.TransformerDecoderLayer])
def test_torchs_transformer_layers_are_quantized_around_their_attention(
    kind: Any,
    batch_first: bool,
    custom: Callable[..., Checkpoint],
    context: Callable[..., Context],
    output: Callable[[Checkpoint], Tensor],
    caplog: pytest.LogCaptureFixture,
) -> None:
    checkpoint = custom(Encoder(kind(16, 4, 32, batch_first=batch_first).eval()))
    caplog.set_level("INFO", logger="diffpress")
    quantized = quantize(checkpoint, QuantizeConfig(**SETTINGS), context(checkpoint))
    integer = {key.removesuffix(".input") for key in scales_of(quantized).amax if key.endswith(".input")}
    assert integer == {"layer.linear1", "layer.linear2"}
    assert ran(quantized) == set(scales_of(quantized).amax)
    attentions = ["layer.self_attn.out_proj", "layer.multihead_attn.out_proj"]
    names = ", ".join(attentions[: 2 if kind is nn.TransformerDecoderLayer else 1])
    assert f"kept in float: {names} (its forward is not called)" in caplog.text
    # the fast path would bypass the quantizers: 200 dB
    assert 20 < sqnr_db(output(checkpoint).numpy(), output(quantized).numpy()) < 100


def test_a_model_of_which_nothing_can_be_quantized_is_refused_with_the_reasons(
    custom: Callable[..., Checkpoint], context: Callable[..., Context]
) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.middle, self.last = (nn.ConvTranspose2d(*n, 1) for n in ((1, 4), (4, 4), (4, 1)))

        def forward(self, sample: Tensor, timestep: Tensor) -> Tensor:
            return self.last(self.middle(torch.tanh(self.first(sample))))

    checkpoint = custom(Bare())
    with pytest.raises(InvalidInputError, match=r"no layer of the model can be in int8: .*transposed convolutions"):
        quantize(checkpoint, QuantizeConfig(**SETTINGS), context(checkpoint))


def test_a_patched_forward_of_one_layer_is_not_torchs() -> None:
    layer: Any = nn.Linear(2, 2)
    assert not unsupported(layer)
    layer.forward = torch.tanh
    assert unsupported(layer) == "it does not use torch's forward"
