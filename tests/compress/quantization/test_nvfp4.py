"""compress/quantization/nvfp4.py: compared with ml_dtypes' 4-bit floats and the formula in numpy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, save_checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.quantization.calibration.weight_scales import weight_amax
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.layer_selection import choose_formats
from diffpress.compress.quantization.nvfp4 import e2m1
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized, insert_quantizers, quantizer_amax

FOUR, EIGHT = ml_dtypes.float4_e2m1fn, ml_dtypes.float8_e4m3fn


def nvfp4_reference(x: np.ndarray) -> np.ndarray:
    """NVFP4 in blocks of 16 along the last axis, with ml_dtypes' rounding of numbers and scales."""
    blocks = x.reshape(-1, 16)
    top = np.float32(np.abs(x).max() / (6 * 448))
    scales = np.maximum(np.abs(blocks).max(1, keepdims=True) / 6 / top, 2.0**-9).astype(EIGHT).astype(np.float32) * top
    return (np.clip(blocks / scales, -6, 6).astype(FOUR).astype(np.float32) * scales).reshape(x.shape)


def test_e2m1_rounds_to_the_nearest_of_fifteen_numbers_with_ties_to_the_even_mantissa() -> None:
    x = torch.cat([torch.linspace(-7, 7, 28001), torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])])
    np.testing.assert_array_equal(e2m1(x).numpy(), np.clip(x.numpy(), -6, 6).astype(FOUR).astype(np.float32))


@pytest.fixture
def layer() -> nn.Module:
    torch.manual_seed(0)
    linear = nn.Linear(64, 24)
    with torch.no_grad():
        linear.weight[3, 16:32] = 0.0  # a block of zeros
        linear.weight[5] *= 1e-4  # blocks with very small scales
    return nn.Sequential(linear)


def test_weights_and_activations_match_the_formula(layer: Any) -> None:
    exact = layer[0].weight.detach().clone()
    insert_quantizers(layer, {"0": "nvfp4"}, [])
    layer[0].weight_quantizer.amax = quantizer_amax(weight_amax(exact, FORMATS["nvfp4"]), layer[0])
    x = torch.randn(5, 7, 64, generator=torch.Generator().manual_seed(1))
    layer[0].input_quantizer.amax = x.abs().max()
    # the block of zeros has the scale of its channel and stays zero
    np.testing.assert_allclose(layer[0].weight_quantizer(exact).numpy(), nvfp4_reference(exact.numpy()), atol=1e-7)
    np.testing.assert_allclose(layer[0].input_quantizer(x).numpy(), nvfp4_reference(x.numpy()), atol=1e-6)


def test_gradients_use_the_straight_through_estimator(layer: Any) -> None:
    insert_quantizers(layer, {"0": "nvfp4"}, [])
    layer[0].weight_quantizer.amax = quantizer_amax(weight_amax(layer[0].weight, FORMATS["nvfp4"]), layer[0])
    layer[0].input_quantizer.amax = torch.tensor(3.0)
    x = torch.randn(2, 64, requires_grad=True)
    layer(x).sum().backward()
    rounded = layer[0].weight_quantizer(layer[0].weight).detach()
    torch.testing.assert_close(x.grad, rounded.sum(0).expand_as(x))
    assert layer[0].weight.grad.abs().sum() > 0


def test_layers_that_nvfp4_does_not_support_use_fp8(unet: Checkpoint) -> None:
    chosen = choose_formats(unet.model, QuantizeConfig(format="nvfp4"))
    assert chosen["mid_block.attentions.0.to_q"] == "nvfp4" and chosen["mid_block.resnets.0.conv1"] == "fp8"
    assert chosen["time_embedding.linear_1"] == "int8_weight_only"
    widths = nn.Sequential(nn.Linear(24, 8), nn.Linear(32, 8), nn.Linear(8, 8))
    bare = QuantizeConfig(format="nvfp4", keep_sensitive_layers=False)
    assert choose_formats(widths, bare) == {"0": "fp8", "1": "nvfp4", "2": "fp8"}


def test_a_checkpoint_in_nvfp4_is_reloaded_unchanged(
    unet: Checkpoint,
    context: Callable[..., Context],
    output: Callable[[Checkpoint], torch.Tensor],
    tmp_path: Path,
    reopened: Callable[..., Checkpoint],
) -> None:
    checkpoint = quantize(
        unet, QuantizeConfig(format="nvfp4", samples=2, batch=2, output_correction=False), context(unet)
    )
    save_checkpoint(checkpoint, tmp_path / "c")
    again = reopened(str(tmp_path / "c"))
    assert again.hash == checkpoint.hash
    torch.testing.assert_close(output(again), output(checkpoint), rtol=0, atol=0)
    assert 10 < sqnr_db(output(unet).numpy(), output(checkpoint).numpy()) < 40
    assert fake_quantized(again) is not again.model
