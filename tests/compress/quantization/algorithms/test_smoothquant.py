"""compress/quantization/algorithms/smoothquant.py and wiring.py: magnitude moves, the function stays, and who reads what is seen."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffpress.compress.checkpoint import save_checkpoint
from diffpress.compress.config import PruneConfig, QuantizeConfig
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.pruning.prune import prune
from diffpress.compress.quantization.algorithms.smoothquant import CONCAT_ALPHA, smoothing, vector
from diffpress.compress.quantization.calibration.observer import CALIBRATION_SEED
from diffpress.compress.quantization.layer_graph import trace_layer_graph
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.sampler import generate

PLAIN = {"samples": 4, "batch": 4, "output_correction": False}


class Tokens(nn.Module):
    """Pixels as tokens of 16 channels, of which a few are far larger than the rest."""

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


class Join(nn.Module):
    """A small stream joined to a skip a hundred times as large, as it is and behind norm and activation."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.stream, self.skip = nn.Conv2d(1, 8, 1), nn.Conv2d(8, 6, 1), nn.Conv2d(8, 10, 1)
        self.norm = nn.GroupNorm(2, 16)
        self.shortcut, self.inner, self.last = nn.Conv2d(16, 8, 1), nn.Conv2d(16, 8, 3, padding=1), nn.Conv2d(8, 1, 1)
        with torch.no_grad():  # and the small one matters as much
            for layer in (self.shortcut, self.inner):
                layer.weight[:, :6] *= 100.0

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.first(sample))
        joined = torch.cat([self.stream(x), 100 * self.skip(x)], 1)
        return self.last(self.shortcut(joined) + self.inner(F.silu(self.norm(joined))))


@pytest.fixture
def tokens(custom):
    torch.manual_seed(0)
    return custom(Tokens())


@pytest.fixture
def join(custom):
    torch.manual_seed(0)
    return custom(Join())


def largest_inputs(checkpoint, layer: str, axis: int) -> torch.Tensor:
    """What calibration sees of one layer, by input channel."""
    seen, model = [], checkpoint.clone_model()
    hook = lambda _, args: seen.append(args[0].abs().movedim(axis, 0).flatten(1).amax(1))  # noqa: E731
    model.get_submodule(layer).register_forward_pre_hook(hook)
    seeds = range(CALIBRATION_SEED, CALIBRATION_SEED + 4)
    generate(TorchNetwork(model, checkpoint.spec), checkpoint.spec, seeds, batch=4)
    return torch.stack(seen).amax(0)


def of_mean_one(s: torch.Tensor) -> torch.Tensor:
    return s / s.log().mean().exp()


# --- the vectors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0])
def test_a_smoothing_vector_is_the_formula_over_the_models_own_trajectory(alpha, tokens, context):
    found = smoothing(tokens, ["inner"], QuantizeConfig(**PLAIN, smooth=alpha), context(tokens))
    x, w = largest_inputs(tokens, "inner", 2), tokens.model.inner.weight.detach().abs().amax(0)
    expected = of_mean_one(x.clamp(min=1e-3 * x.max()) ** alpha / w ** (1 - alpha))
    torch.testing.assert_close(found["inner"], expected, rtol=1e-5, atol=0.0)


def test_a_channel_or_weight_that_is_always_zero_gets_a_finite_vector():
    found = vector(torch.tensor([0.0, 1.0, 4.0]), torch.tensor([1.0, 0.0, 1.0]), 0.5)
    assert torch.isfinite(found).all() and (found > 0).all() and found[0] < found[2]
    assert vector(torch.zeros(2), torch.zeros(2), 0.5).tolist() == [1.0, 1.0]


def test_both_halves_of_a_join_get_a_factor_of_their_own(join, context):
    found = smoothing(join, ["shortcut", "inner", "skip"], QuantizeConfig(**PLAIN, split_concats=True), context(join))
    assert found.keys() == {"shortcut", "inner"}
    for name in found:
        w = join.model.get_submodule(name).weight.detach().abs().amax((0, 2, 3)).split([6, 10])
        x = largest_inputs(join, name, 1).split([6, 10])
        halves = [a.max() ** CONCAT_ALPHA / b.max() ** (1 - CONCAT_ALPHA) for a, b in zip(x, w, strict=True)]
        expected = of_mean_one(torch.stack(halves).repeat_interleave(torch.tensor([6, 10])))
        torch.testing.assert_close(found[name], expected, rtol=1e-5, atol=0.0)


def test_nothing_is_run_where_nothing_is_to_be_smoothed(join, context, monkeypatch):
    monkeypatch.setattr(TorchNetwork, "run", None)
    assert smoothing(join, ["inner"], QuantizeConfig(**PLAIN), context(join)) == {}


# --- who reads what --------------------------------------------------------------------------------------------


def test_layers_of_one_attention_share_their_vector_and_the_scale_of_their_input(unet, context):
    found = quantize(unet, QuantizeConfig(**PLAIN, smooth=0.5), context(unet)).quantization
    q, k, v = (f"mid_block.attentions.0.to_{x}" for x in "qkv")
    assert torch.equal(found.smooth[q], found.smooth[k]) and torch.equal(found.smooth[q], found.smooth[v])
    assert found.amax[f"{q}.input"] == found.amax[f"{k}.input"] == found.amax[f"{v}.input"]
    weights = [unet.model.get_submodule(name).weight.detach().abs().amax(0) for name in (q, k, v)]
    x = largest_inputs(unet, q, 2)
    expected = of_mean_one((x.clamp(min=1e-3 * x.max()) / torch.stack(weights).amax(0)).sqrt())
    torch.testing.assert_close(found.smooth[q], expected, rtol=1e-4, atol=0.0)
    other = "mid_block.attentions.0.to_out.0"
    assert not torch.equal(found.smooth[q], found.smooth[other])


def test_joins_are_found_where_the_adapter_knows_them_with_the_widths_that_pruning_left(unet, context):
    small = prune(unet, PruneConfig(method="magnitude", ratio=0.4, round_to=4), context(unet))
    for checkpoint in (unet, small):
        model = checkpoint.model
        parts = trace_layer_graph(checkpoint, choose_formats(model, QuantizeConfig())).parts
        joins = adapter_for(model).skip_concats(model)
        assert {f"{join}.conv1" for join in joins} <= set(parts)
        modules = dict(model.named_modules())
        for name in (f"{join}.{layer}" for join in joins for layer in ("conv1", "conv_shortcut")):
            if name in modules:
                assert len(parts[name]) == 2 and sum(parts[name]) == modules[name].in_channels
    first = joins[0]
    assert parts[f"{first}.conv1"][0] == small.model.mid_block.resnets[-1].conv2.out_channels


def test_a_reader_of_two_tensors_joins_their_groups(custom):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.alone = (nn.Conv2d(1, 1, 1) for _ in range(4))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
            other = sample + 1
            return self.alone(self.a(sample) + self.b(sample) + self.b(other) + self.c(other))

    groups = trace_layer_graph(custom(Twice()), ["a", "b", "c", "alone"]).groups
    assert sorted(map(sorted, groups)) == [["a", "b", "c"], ["alone"]]


# --- what it is for --------------------------------------------------------------------------------------------


def samples(checkpoint):
    return generate(TorchNetwork(fake_quantized(checkpoint), checkpoint.spec), checkpoint.spec, range(8), batch=8)


@pytest.mark.parametrize(("which", "settings"), [("tokens", {"smooth": 0.5}), ("join", {"split_concats": True})])
def test_uneven_channels_are_rounded_better(which, settings, request, context):
    checkpoint = request.getfixturevalue(which)
    exact = samples(checkpoint)
    plain, smooth = (
        sqnr_db(exact, samples(quantize(checkpoint, QuantizeConfig(**PLAIN, **more), context(checkpoint))))
        for more in ({}, settings)
    )
    assert smooth > plain + 3.0


def rounded(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    scale = amax / 127
    return torch.clamp(torch.round(x / scale), -128, 127) * scale


@pytest.mark.parametrize("which", ["tokens", "join"])
def test_fake_quantization_divides_activations_and_multiplies_weights(which, request, context):
    checkpoint = request.getfixturevalue(which)
    config = QuantizeConfig(**PLAIN, smooth=0.5, split_concats=True, outputs=False)
    found = quantize(checkpoint, config, context(checkpoint))
    model, seen, layer = fake_quantized(found), {}, checkpoint.model.inner
    model.inner.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        model(torch.randn(3, 1, 8, 8), torch.tensor([1, 20, 49]))
        amax, s = found.quantization.amax, found.quantization.smooth["inner"]
        s = s.view(-1, *[1] * (layer.weight.dim() - 2))
        weight = rounded(layer.weight * s, amax["inner.weight"].view(-1, *[1] * (layer.weight.dim() - 1)))
        x = rounded(seen["x"] / s, amax["inner.input"])
        expected = F.linear(x, weight, layer.bias) if which == "tokens" else F.conv2d(x, weight, layer.bias, padding=1)
    # a value on the edge between two integers may fall the other way: x / s is x times 1 / s there
    assert (seen["out"] - expected).abs().median() < 1e-5
    assert sqnr_db(expected.numpy(), seen["out"].numpy()) > 55
    assert torch.equal(checkpoint.model.inner.weight, found.model.inner.weight)


def test_smoothing_is_saved_with_the_checkpoint(unet, context, output, tmp_path):
    found = quantize(unet, QuantizeConfig(**PLAIN, smooth=0.5, split_concats=True), context(unet))
    save_checkpoint(found, tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    assert again.hash == found.hash and torch.equal(output(again), output(found))
    assert again.quantization.smooth.keys() == found.quantization.smooth.keys() != set()
