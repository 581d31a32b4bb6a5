"""Scales of a weight [out, in, ...]: one per output channel, or one per block of its inputs (formats.scale_shape).

amax[o] = max_i |w[o, i]|        amax[o, b] = max_{i in block b} |w[o, i]|        i over the flattened row, in x kernel
"""

from __future__ import annotations

import torch

from diffpress.compress.quantization.formats import LEAST_MAGNITUDE, Format, scale_shape


def weight_amax(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """Return the largest magnitudes, float32 [out] or [out, blocks]; 0 only if the entire weight is 0.

    A block of zeros takes the amax of its channel, and a channel of zeros that of the weight, since any scale
    represents it.
    """
    shape = scale_shape(form, weight.shape)
    rows = weight.detach().float().abs().flatten(1)
    channels = rows.amax(1)
    channels = torch.where(channels >= LEAST_MAGNITUDE, channels, channels.amax())
    if len(shape) == 1:
        return channels
    blocks = rows.unflatten(1, (shape[1], -1)).amax(2)
    return torch.where(blocks >= LEAST_MAGNITUDE, blocks, channels[:, None])


def broadcast_amax(amax: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Expand `amax` [out] or [out, blocks] to a shape that broadcasts with `weight`."""
    if amax.dim() < 2:
        return amax.reshape(-1, *[1] * (weight.dim() - 1))
    return amax.repeat_interleave(weight[0].numel() // amax.shape[1], 1).view_as(weight)
