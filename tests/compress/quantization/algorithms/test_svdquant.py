"""compress/quantization/algorithms/svdquant.py: the largest singular values stay in float; the rest is quantized."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.compress.quantization.scales import scales_of

PTQ: dict[str, Any] = {"samples": 4, "batch": 4, "output_correction": False}
LAYER = "mid_block.attentions.0.to_q"


@pytest.fixture
def low_rank_unet(unet: Checkpoint) -> Checkpoint:
    """The tiny U-Net with two large singular values in the weight of one layer."""
    model = unet.clone_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        factors = torch.randn(32, 2, generator=generator), torch.randn(2, 32, generator=generator)
        model.get_parameter(f"{LAYER}.weight").add_(factors[0] @ factors[1])
    return unet.evolve(model=model)


def layer_output(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.get_submodule(LAYER)(torch.randn(2, 30, 32, generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize(
    ("settings", "largest"),
    [
        ({"format": "w4a8"}, 7),
        ({"format": "int8"}, 64),
        ({"format": "int4"}, 7),
        ({"format": "w4a8", "smoothquant": {"alpha": 0.5}}, 7),
    ],
    ids=str,
)
def test_factors_and_residual_sum_to_the_weight_and_scales_match_the_residual(
    settings: dict[str, Any], largest: int, low_rank_unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = quantize(low_rank_unet, QuantizeConfig(**PTQ, **settings, svdquant={"rank": 2}), context(low_rank_unet))
    scales = scales_of(found)
    modules: dict[str, Any] = dict(low_rank_unet.model.named_modules())
    layers = {key.rpartition(".")[0] for key in scales.svdquant}
    assert LAYER in layers and not any("conv" in name or "time" in name for name in layers)
    for name in layers:
        weight, smooth = modules[name].weight.detach(), scales.smooth.get(name, torch.tensor(1.0))
        up, down = scales.svdquant[f"{name}.up"], scales.svdquant[f"{name}.down"]
        assert up.shape == (len(weight), 2) and down.shape == (2, weight.shape[1])
        values = torch.linalg.svdvals((weight - up @ down) * smooth)
        torch.testing.assert_close(values[:-2], torch.linalg.svdvals(weight * smooth)[2:], rtol=1e-3, atol=1e-5)
        residual = ((weight - up @ down) * smooth).abs().amax(1)
        amax = scales.amax[f"{name}.weight"].reshape(len(weight), -1).amax(1)
        torch.testing.assert_close(amax, residual * (127 / 64 if largest == 64 else 1.0), rtol=1e-4, atol=1e-6)
    assert torch.equal(found.model.get_parameter(f"{LAYER}.weight"), modules[LAYER].weight)


@pytest.mark.parametrize("gptq", [None, {"samples": 16}])
def test_the_output_of_a_layer_with_a_branch_is_much_closer_to_the_float_one(
    gptq: Any, low_rank_unet: Checkpoint, context: Callable[..., Context]
) -> None:
    ctx = context(low_rank_unet)
    settings = {**PTQ, "format": "int4", "gptq": gptq}
    exact = layer_output(low_rank_unet.model).numpy()
    found = [
        quantize(low_rank_unet, QuantizeConfig(**settings, svdquant=branch), ctx) for branch in (None, {"rank": 2})
    ]
    before, after = (sqnr_db(exact, layer_output(fake_quantized(c)).numpy()) for c in found)
    assert after > before + 6.0
    assert not scales_of(found[0]).svdquant


def test_the_layer_matches_the_formula(low_rank_unet: Checkpoint, context: Callable[..., Context]) -> None:
    found = quantize(low_rank_unet, QuantizeConfig(**PTQ, format="int8", svdquant={"rank": 2}), context(low_rank_unet))
    scales, x = scales_of(found), torch.randn(3, 9, 32, generator=torch.Generator().manual_seed(2))
    layer: Any = low_rank_unet.model.get_submodule(LAYER)
    down, up = scales.svdquant[f"{LAYER}.down"], scales.svdquant[f"{LAYER}.up"]

    def q(value: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
        return torch.clamp(torch.round(value / amax * 127), -128, 127) * amax / 127

    with torch.no_grad():
        rounded = q(layer.weight - up @ down, scales.amax[f"{LAYER}.weight"][:, None])
        expected = F.linear(q(x, scales.amax[f"{LAYER}.input"]), rounded, layer.bias) + x @ down.T @ up.T
        torch.testing.assert_close(fake_quantized(found).get_submodule(LAYER)(x), expected, atol=2e-5, rtol=1e-4)


def test_a_saved_and_reloaded_checkpoint_is_identical(
    low_rank_unet: Checkpoint,
    context: Callable[..., Context],
    output: Callable[[Checkpoint], torch.Tensor],
    tmp_path: Path,
) -> None:
    found = quantize(low_rank_unet, QuantizeConfig(**PTQ, format="w4a8", svdquant={"rank": 2}), context(low_rank_unet))
    save_checkpoint(found, tmp_path / "saved")
    again = load_checkpoint(str(tmp_path / "saved"))
    assert again.hash == found.hash and torch.equal(output(again), output(found))
    scales = scales_of(found)
    other = replace(scales, svdquant={key: -value for key, value in scales.svdquant.items()})
    assert found.evolve(quantization=other).hash != found.hash


def test_a_full_rank_adds_no_branch(low_rank_unet: Checkpoint, context: Callable[..., Context]) -> None:
    found = quantize(low_rank_unet, QuantizeConfig(**PTQ, format="w4a8", svdquant={"rank": 32}), context(low_rank_unet))
    assert not any(key.startswith(LAYER) for key in scales_of(found).svdquant)


def test_svdquant_excludes_qat() -> None:
    with pytest.raises(InvalidInputError, match="svdquant excludes qat"):
        QuantizeConfig(qat={}, svdquant={})
