"""Moving magnitude from activations, where rounding hurts, into weights: SmoothQuant (Xiao et al. 2023, eq. 4).

    w x = (w diag(s)) (x / s),        s_j = max |x_j|^a / max_o |w_oj|^(1 - a)

over what the model's own trajectory shows at input channel j, and then divided by its geometric mean, for a common
factor changes nothing that is rounded. Layers that read one tensor share one s, from all their weights: so they go on
sharing the integers too.

Where a layer reads a concatenation of a stream and a skip, the two may differ in magnitude by far, and scales of their
own are due (Q-Diffusion, Li et al. 2023). With one accumulator for both that is an s which is constant over each.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.context import Context
from diffpress.compress.quantization.calibration.observer import NonFiniteError, collect_activations
from diffpress.compress.quantization.layer_graph import channel_axis, trace_layer_graph

SMOOTHED: tuple[type[nn.Module], ...] = (nn.Linear,)
CONCAT_ALPHA = 0.5
LEAST_SHARE = 1e-3  # a channel that was never seen active counts as this share of the largest

Vectors = dict[str, torch.Tensor]


def smoothing(checkpoint: Checkpoint, layers: Iterable[str], config: QuantizeConfig, ctx: Context) -> Vectors:
    """Layer -> s, float32 [in], for those of `layers` that `config.smooth` and `config.split_concats` are for.

    One run along the trajectory, before that which finds the scales of the smoothed tensors.
    """
    if not config.smooth and not config.split_concats:
        return {}
    modules: dict[str, Any] = dict(checkpoint.model.named_modules())
    able = [name for name in layers if getattr(modules[name], "groups", 1) == 1]
    layer_graph = trace_layer_graph(checkpoint, able)
    whole = {name for name in able if config.smooth and isinstance(modules[name], SMOOTHED)}
    chosen = [
        group
        for group in layer_graph.groups
        if group[0] in whole or (config.split_concats and group[0] in layer_graph.parts)
    ]
    largest = {group[0]: torch.zeros(modules[group[0]].weight.shape[1]) for group in chosen}
    observers = {
        f"{name}.input": partial(_grow_, largest[group[0]], channel_axis(modules[name]))
        for group in chosen
        for name in group
    }
    if observers:
        collect_activations(checkpoint, observers, largest, "smooth", config, ctx)
    found: Vectors = {}
    for group in chosen:
        x = largest[group[0]]
        w = torch.stack([_by_input(modules[name].weight) for name in group]).amax(0)
        if group[0] in whole:
            s = vector(x, w, config.smooth)
        else:
            widths = layer_graph.parts[group[0]]
            x, w = (torch.cat([part.amax().expand(len(part)) for part in v.split(widths)]) for v in (x, w))
            s = vector(x, w, CONCAT_ALPHA)
        found |= dict.fromkeys(group, s)
    return found


def vector(x: torch.Tensor, w: torch.Tensor, alpha: float) -> torch.Tensor:
    """s, float32 [n], of the largest magnitudes of n input channels and of the weights that they meet."""
    x, w = (values.double().clamp(min=LEAST_SHARE * values.max().item() or 1.0) for values in (x, w))
    s = x**alpha / w ** (1 - alpha)
    return (s / s.log().mean().exp()).float()


def along(s: torch.Tensor, layer: Any) -> torch.Tensor:
    """`s` in the shape in which it multiplies the layer's weight, and 1 / s the layer's input."""
    return s.view(-1, *[1] * (layer.weight.dim() - 2))


def _by_input(weight: torch.Tensor) -> torch.Tensor:
    return weight.detach().float().abs().transpose(0, 1).flatten(1).amax(1).cpu()


def _grow_(largest: torch.Tensor, axis: int, x: torch.Tensor, call: int, samples: int) -> None:
    seen = x.detach().abs().movedim(axis, 0).flatten(1).amax(1).float().cpu()
    if not torch.isfinite(seen).all():
        raise NonFiniteError
    torch.maximum(largest, seen, out=largest)
