"""NVFP4 in torch: 4-bit floats in blocks of 16, with 8-bit float block scales and one float32 tensor scale.

    top = amax / (6 * 448)        s_b = E4M3(amax_b / (6 top)) top        q(x) = E2M1(clip(x / s_b, -6, 6)) s_b

amax is the tensor's, amax_b the block's. For weights both are calibrated; for activations only amax is, and amax_b is
computed at run time, as GPUs do. modelopt implements this for CUDA only; here it is a quantizer backend for any device.
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 16
LARGEST, LARGEST_SCALE = 6.0, 448.0
LEAST_SCALE = 2.0**-9  # smallest positive E4M3: a block of zeros needs a nonzero scale
BACKEND = "diffpress_nvfp4"


def block_scales(amax: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """Return the block scales s_b, shaped like `amax`, from each block's amax and the tensor's `largest`."""
    top = largest.float() / (LARGEST * LARGEST_SCALE)
    shares = (amax.float() / LARGEST / top).clamp(LEAST_SCALE, LARGEST_SCALE)
    return shares.to(torch.float8_e4m3fn).float() * top


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """Round to the nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with sign, ties to the even mantissa."""
    magnitude = x.abs().clamp(max=LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def fake_nvfp4(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """Fake-quantize `x` [..., blocks * 16] to NVFP4 with a straight-through gradient.

    `quantizer.amax` has one value per block [N, 1] or one for the tensor. This is a backend of modelopt's
    TensorQuantizer (`register_quant_backend`).
    """
    amax = quantizer.amax
    blocks = x.detach().float().reshape(-1, BLOCK)
    block_amax = amax if amax.numel() > 1 else blocks.abs().amax(1, keepdim=True)
    scale = block_scales(block_amax, amax.max())
    rounded = (e2m1(blocks / scale) * scale).view_as(x).to(x.dtype)
    return x + (rounded - x).detach()
