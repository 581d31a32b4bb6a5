"""compress/quantization/algorithms/smoothquant.py: smoothing vectors, and the model that they are applied to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.algorithms.smoothquant import CONCAT_ALPHA, smoothing_vectors, vector
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.quantize import quantize, trajectories_of
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.sampler import generate
from tests.compress.quantization.scales import scales_of

PLAIN: dict[str, Any] = {"samples": 4, "batch": 4, "output_correction": False}


class Tokens(nn.Module):
    """Pixels as tokens with 16 channels, a few of which are much larger than the rest."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(1, 16), nn.Linear(16, 16), nn.Linear(16, 1)
        with torch.no_grad():
            self.first.weight[:3] *= 60.0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = sample.flatten(2).transpose(1, 2)
        return self.last(self.inner(torch.tanh(self.first(x)) * self.gain())).transpose(1, 2).view_as(sample)

    def gain(self) -> torch.Tensor:
        return torch.logspace(-2, 2, 16)


class Concat(nn.Module):
    """Concatenation of a stream and a skip 100 times as large, read directly and after norm and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stream, self.skip = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.norm = nn.GroupNorm(2, 16)
        self.shortcut, self.inner, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        with torch.no_grad():  # larger weights make the small stream equally important
            for layer in (self.shortcut, self.inner):
                layer.weight[:, :6] *= 100.0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(sample))
        concatenated = torch.cat([self.stream(x), 100 * self.skip(x)], 1)
        return self.last(self.shortcut(concatenated) + self.inner(F.silu(self.norm(concatenated))))


@pytest.fixture
def tokens(custom: Callable[..., Checkpoint]) -> Checkpoint:
    torch.manual_seed(0)
    return custom(Tokens())


@pytest.fixture
def concat(custom: Callable[..., Checkpoint]) -> Checkpoint:
    torch.manual_seed(0)
    return custom(Concat())


def largest_inputs(checkpoint: Checkpoint, layer: str, axis: int) -> torch.Tensor:
    """Largest input magnitude of one layer during calibration, per channel."""
    observed, model = [], checkpoint.clone_model()
    hook = lambda _, args: observed.append(args[0].abs().movedim(axis, 0).flatten(1).amax(1))  # noqa: E731
    model.get_submodule(layer).register_forward_pre_hook(hook)
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + 4)
    generate(TorchNetwork(model, checkpoint.spec), checkpoint.spec, seeds, batch=4)
    return torch.stack(observed).amax(0)


def vectors(checkpoint: Checkpoint, layers: list[str], ctx: Context, **settings: Any) -> dict[str, torch.Tensor]:
    config = QuantizeConfig(**PLAIN, **settings)
    graph = trace_layer_graph(checkpoint.model, checkpoint.spec)
    formats = dict.fromkeys(layers, "int8")
    return smoothing_vectors(trajectories_of(checkpoint, config, ctx), graph, formats, config)


def normalized(s: torch.Tensor) -> torch.Tensor:
    return s / s.log().mean().exp()


# --- smoothing vectors -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_a_smoothing_vector_matches_the_formula_on_the_models_own_trajectory(
    alpha: float, tokens: Checkpoint, context: Callable[..., Context]
) -> None:
    found = vectors(tokens, ["inner"], context(tokens), smoothquant={"alpha": alpha})
    x, w = largest_inputs(tokens, "inner", 2), tokens.model.get_parameter("inner.weight").detach().abs().amax(0)
    expected = normalized(x.clamp(min=1e-3 * x.max()) ** alpha / w ** (1 - alpha))
    torch.testing.assert_close(found["inner"], expected, rtol=1e-5, atol=0.0)


def test_a_channel_or_weight_that_is_always_zero_has_a_finite_factor() -> None:
    found = vector(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert torch.isfinite(found).all() and (found > 0).all() and found[0] < found[2]
    assert vector(torch.zeros(2), torch.zeros(2), 0.5).tolist() == [1.0, 1.0]


def test_stream_and_skip_of_a_concatenation_have_separate_factors(
    concat: Checkpoint, context: Callable[..., Context]
) -> None:
    found = vectors(concat, ["shortcut", "inner", "skip"], context(concat), split_concats=True)
    assert found.keys() == {"shortcut", "inner"}
    for name in found:
        w = concat.model.get_parameter(f"{name}.weight").detach().abs().amax((0, 2, 3)).split([6, 10])
        x = largest_inputs(concat, name, 1).split([6, 10])
        factors = [a.max() ** CONCAT_ALPHA / b.max() ** (1 - CONCAT_ALPHA) for a, b in zip(x, w, strict=True)]
        expected = normalized(torch.stack(factors).repeat_interleave(torch.tensor([6, 10])))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0.0)


def test_layers_of_one_attention_share_their_vector_and_input_scale(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = scales_of(quantize(unet, QuantizeConfig(**PLAIN, smoothquant={"alpha": 0.5}), context(unet)))
    q, k, v = (f"mid_block.attentions.0.to_{x}" for x in "qkv")
    assert torch.equal(found.smooth[q], found.smooth[k]) and torch.equal(found.smooth[q], found.smooth[v])
    assert found.amax[f"{q}.input"] == found.amax[f"{k}.input"] == found.amax[f"{v}.input"]
    weights = [unet.model.get_parameter(f"{name}.weight").detach().abs().amax(0) for name in (q, k, v)]
    x = largest_inputs(unet, q, 2)
    expected = normalized((x.clamp(min=1e-3 * x.max()) / torch.stack(weights).amax(0)).sqrt())
    torch.testing.assert_close(found.smooth[q], expected, rtol=1e-4, atol=0.0)
    other = "mid_block.attentions.0.to_out.0"
    assert not torch.equal(found.smooth[q], found.smooth[other])


# --- result ----------------------------------------------------------------------------------------------------


def samples(checkpoint: Checkpoint) -> np.ndarray:
    return generate(TorchNetwork(fake_quantized(checkpoint), checkpoint.spec), checkpoint.spec, range(8), batch=8)


@pytest.mark.parametrize(
    ("which", "settings"), [("tokens", {"smoothquant": {"alpha": 0.5}}), ("concat", {"split_concats": True})]
)
def test_models_with_uneven_channels_have_a_higher_sqnr(
    which: str, settings: dict[str, Any], request: pytest.FixtureRequest, context: Callable[..., Context]
) -> None:
    checkpoint = request.getfixturevalue(which)
    reference = samples(checkpoint)
    no_settings: dict[str, Any] = {}
    plain, smooth = (
        sqnr_db(reference, samples(quantize(checkpoint, QuantizeConfig(**PLAIN, **more), context(checkpoint))))
        for more in (no_settings, settings)
    )
    assert smooth > plain + 3.0


def quantized_int8(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    scale = amax / 127
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


@pytest.mark.parametrize("which", ["tokens", "concat"])
def test_fake_quantization_divides_activations_and_multiplies_weights(
    which: str, request: pytest.FixtureRequest, context: Callable[..., Context]
) -> None:
    checkpoint = request.getfixturevalue(which)
    config = QuantizeConfig(**PLAIN, smoothquant={"alpha": 0.5}, split_concats=True, outputs=False)
    found = quantize(checkpoint, config, context(checkpoint))
    model: Any = fake_quantized(found)
    before: Any = checkpoint.model
    after: Any = found.model
    observed: dict[str, torch.Tensor] = {}
    layer = before.inner
    model.inner.register_forward_hook(lambda _, args, out: observed.update(x=args[0], out=out))
    with torch.no_grad():
        model(torch.randn(3, 1, 8, 8), torch.tensor([1, 20, 49]))
        amax, s = scales_of(found).amax, scales_of(found).smooth["inner"]
        s = s.view(-1, *[1] * (layer.weight.dim() - 2))
        weight = quantized_int8(layer.weight * s, amax["inner.weight"].view(-1, *[1] * (layer.weight.dim() - 1)))
        x = quantized_int8(observed["x"] / s, amax["inner.input"])
        expected = F.linear(x, weight, layer.bias) if which == "tokens" else F.conv2d(x, weight, layer.bias, padding=1)
    # a value halfway between two integers may round differently: the model computes x * (1 / s), not x / s
    assert (observed["out"] - expected).abs().median() < 1e-5
    assert sqnr_db(expected.numpy(), observed["out"].numpy()) > 55
    assert torch.equal(before.inner.weight, after.inner.weight)


def test_smoothing_is_saved_with_the_checkpoint(
    unet: Checkpoint, context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor], tmp_path: Path
) -> None:
    found = quantize(unet, QuantizeConfig(**PLAIN, smoothquant={"alpha": 0.5}, split_concats=True), context(unet))
    save_checkpoint(found, tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    assert again.hash == found.hash and torch.equal(output(again), output(found))
    assert scales_of(again).smooth.keys() == scales_of(found).smooth.keys() != set()
