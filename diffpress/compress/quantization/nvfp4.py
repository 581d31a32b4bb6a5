"""NVFP4 in torch: 4-bit floats in blocks of 16, whose scales are 8-bit floats under one float32 for the tensor.

    top = amax / (6 * 448)        s_b = E4M3(amax_b / (6 top)) top        q(x) = E2M1(clip(x / s_b, -6, 6)) s_b

with amax the tensor's and amax_b the block's. A weight's blocks are calibrated; an activation's are found as it comes,
as the GPU does it, and only amax is. (modelopt has this for CUDA alone: this is its quantizer's backend everywhere.)
"""

from __future__ import annotations

from typing import Any

import torch

BLOCK = 16
LARGEST, LARGEST_SCALE = 6.0, 448.0
LEAST_SCALE = 2.0**-9  # of E4M3: a block of zeros has a scale too
BACKEND = "diffpress_nvfp4"


def block_scales(amax: torch.Tensor, largest: torch.Tensor) -> torch.Tensor:
    """s_b from the blocks' magnitudes `amax` and the tensor's `largest`, of the shape of `amax`."""
    top = largest.float() / (LARGEST * LARGEST_SCALE)
    shares = (amax.float() / LARGEST / top).clamp(LEAST_SCALE, LARGEST_SCALE)
    return shares.to(torch.float8_e4m3fn).float() * top


def e2m1(x: torch.Tensor) -> torch.Tensor:
    """The nearest of 0, 0.5, 1, 1.5, 2, 3, 4, 6 with its sign, ties to the even mantissa."""
    magnitude = x.abs().clamp(max=LARGEST)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    return torch.copysign(torch.round(magnitude / step) * step, x)


def fake_nvfp4(x: torch.Tensor, quantizer: Any) -> torch.Tensor:
    """`x` [..., blocks * 16] rounded, with a gradient of 1; `quantizer.amax` is of every block [N, 1] or of the tensor.

    A backend of modelopt's TensorQuantizer (`register_quant_backend`).
    """
    amax = quantizer.amax
    blocks = x.detach().float().reshape(-1, BLOCK)
    own = amax if amax.numel() > 1 else blocks.abs().amax(1, keepdim=True)
    scale = block_scales(own, amax.max())
    rounded = (e2m1(blocks / scale) * scale).view_as(x).to(x.dtype)
    return x + (rounded - x).detach()
