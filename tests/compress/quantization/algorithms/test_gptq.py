"""compress/quantization/algorithms/gptq.py: up or down by what outputs lose; the result is on the grid of its scales."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.quantization.algorithms import gptq
from diffpress.compress.quantization.algorithms.gptq import round_weights, solve
from diffpress.compress.quantization.algorithms.layer_rows import quadratic, rows_of
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.calibration.weight_scales import spread
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError

PTQ = {"samples": 4, "batch": 4, "output_correction": False, "rounding_samples": 16}


@pytest.fixture
def small(custom_files) -> Checkpoint:
    """The user's little module: first, time, norm, inner, last; `inner` computes in integers."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


def pair(checkpoint, context, **settings) -> tuple[Checkpoint, Checkpoint]:
    ctx = context(checkpoint)
    return tuple(
        quantize(checkpoint, QuantizeConfig(**PTQ, **settings, rounding=how), ctx) for how in ("nearest", "gptq")
    )


# --- the problem -----------------------------------------------------------------------------------------------


def problem(seed: int, out: int = 5, k: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels, scales and products of rows whose entries hang together."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(out, k, generator=generator) * 3
    scale = (torch.rand(out, 1, generator=generator) + 0.5).expand(-1, k)
    x = torch.randn(200, k, generator=generator) + 2 * torch.randn(200, 1, generator=generator)
    return levels, scale, x.T @ x / 200


def best(levels, scale, products) -> float:
    """The least error there is, by trying all ways to go up or down."""
    total = 0.0
    for level, s in zip(levels, scale, strict=True):
        most = level.round().abs().max()
        ways = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(level)))) + level.floor()
        ways = ways[(ways.abs() <= most).all(1)]
        error = (level - ways) * s
        total += float(((error @ products) * error).sum(1).min())
    return total


def test_rounding_comes_near_the_best_there_is_and_goes_up_or_down_only():
    ratios = []
    for seed in range(20):
        levels, scale, products = problem(seed)
        found = solve(levels, scale, products)
        assert torch.equal(found, found.round()) and (found - levels).abs().max() < 1.0
        assert (found.abs() <= levels.round().abs().amax(1, keepdim=True)).all()
        errors = [quadratic((levels - q) * scale, products) for q in (found, levels.round())]
        ratios.append(np.array(errors) / best(levels, scale, products))
    ours, nearest = np.mean(ratios, axis=0)
    assert 1.0 - 1e-5 <= ours < 1.3 and nearest > 2.0


def test_inputs_that_have_nothing_in_common_are_best_served_by_the_nearest():
    levels, scale, _ = problem(0)
    assert torch.equal(solve(levels, scale, torch.rand(7).diag()), levels.round())


def test_no_integer_is_larger_than_the_largest_there_was():
    levels, scale, products = torch.tensor([[7.4, 7.4, 1.2], [-7.4, -7.4, 8.3]]), torch.ones(2, 3), torch.ones(3, 3)
    found = solve(levels, scale, products)
    assert found[0].max() == 7  # 7 and 8 would make up for each other
    assert found[1].min() == -8


def test_the_error_goes_on_from_panel_to_panel(monkeypatch):
    levels, scale, products = problem(1, k=40)
    whole = solve(levels, scale, products)
    monkeypatch.setattr(gptq, "PANEL", 7)
    assert torch.equal(solve(levels, scale, products), whole)


def test_a_layer_that_sees_nothing_but_zeros_takes_the_nearest():
    levels, scale, _ = problem(0)
    assert torch.equal(solve(levels, scale, torch.zeros(7, 7)), levels.round())


LAYERS = {
    "conv": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (6, 5, 7)),
    "strided": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (6, 8, 7)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding="same", padding_mode="reflect", bias=False), (6, 5, 7)),
    "tokens": (nn.Linear(6, 8, bias=False), (5, 6)),
    "vector": (nn.Linear(6, 8, bias=False), (6,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_are_what_the_weight_is_multiplied_with(kind):
    layer, shape = LAYERS[kind]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = layer(x)
        out = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out.reshape(3, -1, 8)  # [3, places, 8]
        rows = rows_of(layer, x, 10**6, torch.Generator().manual_seed(0))
        found = rows @ layer.weight.reshape(len(rows), 8 // len(rows), -1).transpose(1, 2)
        found = found.transpose(0, 1).reshape(3, -1, 8)
    for ours, theirs in zip(found, out, strict=True):  # of each state all places, in any order
        torch.testing.assert_close(ours[ours[:, 0].argsort()], theirs[theirs[:, 0].argsort()])
    few = rows_of(layer, x, 6, torch.Generator().manual_seed(0))
    assert few.shape[1] == (3 if kind == "vector" else 6)


# --- the result is data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"format": "int4"}, torch.float32),
        ({"format": "int8"}, torch.float32),
        ({"format": "int8", "reduce_range": False}, torch.bfloat16),
        ({"format": "w4a8", "smooth": 0.5}, torch.float32),
        ({"format": "w4a8", "smooth": 0.5, "keep_sensitive_layers": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_rounding_the_result_to_the_nearest_changes_nothing(settings, dtype, unet, context):
    narrow = unet.evolve(model=unet.clone_model().to(dtype))
    nearest, found = pair(narrow, context, **settings)
    scales, moved = found.quantization, 0
    assert scales.amax.keys() == nearest.quantization.amax.keys()
    assert all(torch.equal(scales.amax[key], nearest.quantization.amax[key]) for key in scales.amax)
    before, after = (dict(c.model.named_modules()) for c in (nearest, found))
    for name in scales.layers:
        weight, old = (layers[name].weight.detach().float() for layers in (after, before))
        assert after[name].weight.dtype == dtype
        smooth = along(scales.smooth[name], after[name]) if name in scales.smooth else 1.0
        largest = FORMATS[scales.format_of(name)].weights.largest
        levels, past = (w * smooth / (spread(scales.amax[f"{name}.weight"], w) / largest) for w in (weight, old))
        # bfloat16 is exact to 2^-8: of 127 that is not quite a half
        assert (levels - levels.round()).abs().max() < (1e-3 if dtype == torch.float32 else 0.497)
        assert (levels.round() - past).abs().max() < 1.0 + 1e-3
        assert levels.round().abs().max() <= past.round().abs().max()
        moved += int((levels.round() != past.round()).sum())
    assert moved > 1000
    assert not any("quantizer" in name for name in after)
    untouched = set(before) - set(scales.layers)
    assert all(torch.equal(after[n].weight, before[n].weight) for n in untouched if hasattr(after[n], "weight"))


@pytest.mark.parametrize("settings", [{"format": "int4", "smooth": 0.5}], ids=str)
def test_fake_quantization_gives_back_the_weights_that_were_found(settings, unet, context):
    found = pair(unet, context, **settings)[1]
    model, rounded = fake_quantized(found), 0
    for name in found.quantization.layers:
        layer = model.get_submodule(name)
        weight = layer.weight.detach()
        smooth = layer.weight_quantizer.pre_quant_scale
        exact = weight if smooth is None else weight * smooth
        torch.testing.assert_close(layer.weight_quantizer(weight), exact, rtol=1e-5, atol=1e-7)
        rounded += 1
    assert rounded > 20


@pytest.mark.parametrize(("form", "pieces", "gain"), [("w4a8", True, 1.0), ("int4", False, 2.0)])
def test_outputs_come_nearer_to_the_float_models(form, pieces, gain, unet, context, output, monkeypatch):
    if pieces:
        monkeypatch.setattr(gptq, "COLUMNS", 100)
    before, after = (sqnr_db(output(unet).numpy(), output(c).numpy()) for c in pair(unet, context, format=form))
    assert after > before + gain  # on states that rounding never saw


def test_the_same_seed_gives_the_same_hash_and_the_input_stays_as_it_was(small, context):
    before = small.hash
    first, second = (pair(small, context, format="w4a8")[1] for _ in range(2))
    assert first.hash == second.hash and small.evolve().hash == before


class Killed(Exception):
    pass


def test_a_killed_run_takes_what_it_had_finished(unet, context, monkeypatch, tmp_path):
    nearest, undisturbed = pair(unet, context, format="w4a8")
    config, ctx = QuantizeConfig(**PTQ, format="w4a8", rounding="gptq"), context(unet, seed=0)
    for file in (ctx.work / "rounding").iterdir():
        file.unlink()
    solved = []

    def killing(*arguments):
        if len(solved) == 5:
            raise Killed
        solved.append(1)
        return solve(*arguments)

    monkeypatch.setattr(gptq, "solve", killing)
    with pytest.raises(Killed):
        round_weights(nearest, config, ctx)
    monkeypatch.setattr(gptq, "solve", lambda *arguments: solved.append(1) or solve(*arguments))
    monkeypatch.setattr(gptq, "sample_trajectories", lambda *_: pytest.fail("the states were there already"))
    assert round_weights(nearest, config, ctx).hash == undisturbed.hash
    assert len(solved) == len(nearest.quantization.layers)
    # nothing is left to do, and another run's files are no use
    round_weights(nearest, config, ctx)
    assert len(solved) == len(nearest.quantization.layers)
    with pytest.raises(pytest.fail.Exception):
        round_weights(nearest, config.model_copy(update={"rounding_samples": 8}), ctx)


def test_a_file_that_cannot_be_read_is_named(small, context):
    ctx = context(small)
    pair(small, context, format="w4a8")
    (ctx.work / "rounding" / "inner.safetensors").write_bytes(b"not at all")
    with pytest.raises(
        InvalidInputError, match=r"inner\.safetensors: the saved state of rounding cannot be read .*; delete it"
    ):
        quantize(small, QuantizeConfig(**PTQ, format="w4a8", rounding="gptq"), ctx)


@pytest.mark.parametrize("settings", [{"format": "fp8"}, {"format": "nvfp4"}, {"rounding_samples": 0}])
def test_settings_that_mean_nothing_are_refused(settings):
    with pytest.raises(ValidationError):
        QuantizeConfig(**settings, rounding="gptq")
