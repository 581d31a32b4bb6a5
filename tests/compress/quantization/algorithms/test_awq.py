"""compress/quantization/algorithms/awq.py: the best scale, shared by all layers that read the same tensor."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.quantization.algorithms.awq import EXPONENTS, best_vector
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.runtime.errors import InvalidInputError
from tests.compress.quantization.scales import scales_of

PTQ: dict[str, Any] = {"samples": 4, "batch": 4, "output_correction": False}
AWQ: dict[str, Any] = {"samples": 16}
ATTENTION = "mid_block.attentions.0"


def rows(outlier: float = 40.0) -> torch.Tensor:
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    x[:, 3] *= outlier
    return x


def weight(seed: int, out: int = 16) -> torch.Tensor:
    return torch.randn(out, 64, generator=torch.Generator().manual_seed(seed))


def q(w: torch.Tensor, block: int) -> torch.Tensor:
    """Round to nearest of -7..7 times the block's largest magnitude over 7."""
    blocks = w.unflatten(1, (-1, block))
    scale = blocks.abs().amax(2, keepdim=True) / 7
    return ((blocks / scale).round().clamp(-7, 7) * scale).flatten(1)


@pytest.mark.parametrize(("form", "block"), [("int4", 32), ("w4a8", 64)])
def test_the_scale_is_the_best_power_of_the_mean_magnitude(form: str, block: int) -> None:
    x, weights = rows(), [weight(1), weight(2, 24)]
    mean = x.abs().mean(0)
    errors, vectors = [], []
    for exponent in EXPONENTS:
        s = mean**exponent / (mean**exponent).log().mean().exp()
        errors.append(sum(((x / s) @ q(w * s, block).T - x @ w.T).square().mean().item() * len(w) for w in weights))
        vectors.append(s)
    best = int(torch.tensor(errors).argmin())
    s, gain = best_vector(x, [(w, FORMATS[form]) for w in weights])
    torch.testing.assert_close(s, vectors[best])
    assert gain == pytest.approx(errors[best] / errors[0], rel=1e-3) and gain < 0.5
    assert s.argmax() == 3 and s.log().mean() == pytest.approx(0.0, abs=1e-5)


def test_a_channel_that_is_always_zero_has_a_finite_scale() -> None:
    x = rows()
    x[:, 7] = 0.0
    s, gain = best_vector(x, [(weight(1), FORMATS["int4"])])
    assert torch.isfinite(s).all() and (s > 0).all() and gain <= 1.0
    assert best_vector(torch.zeros(5, 64), [(weight(1), FORMATS["int4"])])[1] == 1.0


@pytest.fixture
def uneven(unet: Checkpoint) -> Checkpoint:
    """The tiny U-Net with one attention input channel that is thirty times as large as the others."""
    model: Any = unet.clone_model()
    with torch.no_grad():
        model.mid_block.attentions[0].group_norm.weight[5] *= 30.0
    return unet.evolve(model=model)


def query_output(model: torch.nn.Module) -> torch.Tensor:
    """Output of the attention's query layer for a fixed input."""
    x = torch.randn(2, 50, 32, generator=torch.Generator().manual_seed(3))
    x[..., 5] *= 30.0
    with torch.no_grad():
        return model.get_submodule(f"{ATTENTION}.to_q")(x)


@pytest.mark.parametrize("form", ["int4", "w4a8"])
def test_the_output_of_a_quantized_layer_is_closer_to_the_float_one(
    form: str, uneven: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(uneven)
    before, found = (quantize(uneven, QuantizeConfig(**PTQ, format=form, awq=awq), ctx) for awq in (None, AWQ))
    scales = scales_of(found)
    smooth, amax = scales.smooth, scales.amax
    exact = query_output(uneven.model)
    errors = [(query_output(fake_quantized(c)) - exact).square().mean().item() for c in (before, found)]
    assert errors[1] < 0.6 * errors[0]
    for key, value in smooth.items():
        layer = uneven.model.get_submodule(key)
        assert isinstance(layer, torch.nn.Linear) and value.shape == (layer.in_features,)
        largest = (layer.weight * value).abs().amax(1).detach()
        torch.testing.assert_close(amax[f"{key}.weight"].reshape(len(largest), -1).amax(1), largest)
    attention_scales = [smooth[f"{ATTENTION}.{name}"] for name in ("to_q", "to_k", "to_v")]
    assert torch.equal(attention_scales[0], attention_scales[1]) and torch.equal(
        attention_scales[0], attention_scales[2]
    )
    assert all(scales.format_of(name) == form for name in smooth)
    assert torch.equal(found.model.state_dict()["conv_in.weight"], uneven.model.state_dict()["conv_in.weight"])


def test_nothing_is_scaled_without_awq_or_4_bit_linear_layers(
    uneven: Checkpoint, context: Callable[..., Context]
) -> None:
    assert not scales_of(quantize(uneven, QuantizeConfig(**PTQ, format="int4"), context(uneven))).smooth
    only_convolutions = QuantizeConfig(**PTQ, format="int4", awq=AWQ, layers=("conv",))
    assert not scales_of(quantize(uneven, only_convolutions, context(uneven))).smooth


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"format": "int8"}, "use format int4 or w4a8"),
        ({"format": "fp8"}, "use format int4 or w4a8"),
        ({"format": "w4a8", "smoothquant": {"alpha": 0.5}}, "remove one of them"),
        ({"format": "w4a8", "split_concats": True}, "remove one of them"),
    ],
)
def test_settings_that_cannot_be_combined_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason):
        QuantizeConfig(**settings, awq=True)
    assert QuantizeConfig(format_overrides={"mid_block": "int4"}, awq=True).awq
