"""SmoothQuant: move magnitude from activations into weights (Xiao et al. 2023, eq. 4).

    w x = (w diag(s)) (x / s),        s_j = max |x_j|^a / max_o |w_oj|^(1 - a)

The maximum of |x_j| is taken over the model's own trajectory. s is divided by its geometric mean, as a common factor
does not affect rounding. Layers that read the same tensor share one s, computed from all their weights, so that they
also share the quantized tensor.

If a layer reads a concatenation of stream and skip, the two can differ widely in magnitude and need separate scales
(Q-Diffusion, Li et al. 2023). With one accumulator for both, this is an s that is constant over each of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.quantization.calibration.observer import NonFiniteError, collect_activations
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.layer_graph import channel_axis, trace_layer_graph

SMOOTHED: tuple[type[nn.Module], ...] = (nn.Linear,)
CONCAT_ALPHA = 0.5
LEAST_SHARE = 1e-3  # lower limit of a channel's maximum, as a fraction of the largest over channels

Vectors = dict[str, torch.Tensor]


def smoothing(checkpoint: Checkpoint, layers: Iterable[str], config: QuantizeConfig, ctx: Context) -> Vectors:
    """Return layer -> s, float32 [in], for those of `layers` that `config.smooth` and `config.split_concats` apply to.

    This is a separate sampling run, before the one that calibrates the scales of the smoothed tensors.
    """
    if not config.smooth and not config.split_concats:
        return {}
    modules: dict[str, Any] = dict(checkpoint.model.named_modules())
    candidates = [name for name in layers if getattr(modules[name], "groups", 1) == 1]
    layer_graph = trace_layer_graph(checkpoint, candidates)
    smoothed = {name for name in candidates if config.smooth and isinstance(modules[name], SMOOTHED)}
    chosen = [
        group
        for group in layer_graph.groups
        if group[0] in smoothed or (config.split_concats and group[0] in layer_graph.parts)
    ]
    largest = {group[0]: torch.zeros(modules[group[0]].weight.shape[1]) for group in chosen}
    observers = {
        f"{name}.input": partial(_update_max_, largest[group[0]], channel_axis(modules[name]))
        for group in chosen
        for name in group
    }
    if observers:
        collect_activations(checkpoint, observers, largest, "smooth", config, ctx)
    found: Vectors = {}
    for group in chosen:
        x = largest[group[0]]
        w = torch.stack([_input_channel_max(modules[name].weight) for name in group]).amax(0)
        if group[0] in smoothed:
            s = vector(x, w, config.smooth)
        else:
            widths = layer_graph.parts[group[0]]
            x, w = (torch.cat([part.amax().expand(len(part)) for part in v.split(widths)]) for v in (x, w))
            s = vector(x, w, CONCAT_ALPHA)
        found |= dict.fromkeys(group, s)
    return found


def vector(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """Return s, float32 [n], from the largest magnitudes of n input channels (x) and of their weights (w)."""
    x, w = (values.double().clamp(min=LEAST_SHARE * values.max().item() or 1.0) for values in (x, w))
    s = x**alpha / w ** (1 - alpha)
    return (s / s.log().mean().exp()).float()


def along(s: torch.Tensor, layer: Any) -> torch.Tensor:
    """Reshape `s` so that it broadcasts with the layer's weight, and 1 / s with the layer's input."""
    return s.view(-1, *[1] * (layer.weight.dim() - 2))


def _input_channel_max(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1).cpu()


def _update_max_(largest: torch.Tensor, axis: int, x: torch.Tensor, evaluation: int, samples: int) -> None:
    seen = x.detach().abs().movedim(axis, 0).flatten(1).amax(1).float().cpu()
    if not torch.isfinite(seen).all():
        raise NonFiniteError
    torch.maximum(largest, seen, out=largest)
