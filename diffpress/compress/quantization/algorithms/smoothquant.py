"""SmoothQuant: move magnitude from activations into weights (Xiao et al. 2023, eq. 4).

    w x = (w diag(s)) (x / s),        s_j = max |x_j|^a / max_o |w_oj|^(1 - a)

The maximum of |x_j| is taken over the model's own trajectory. s is divided by its geometric mean, as a common factor
does not affect rounding. Layers that read the same tensor share one s, computed from all their weights, so that they
also share the quantized tensor.

If a layer reads a concatenation of stream and skip, the two can differ widely in magnitude and need separate scales
(Q-Diffusion, Li et al. 2023). With one accumulator for both, this is an s that is constant over each of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from diffpress.compress.quantization.calibration.observer import CalibrationData, NonFiniteError
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.layer_graph import LayerGraph
from diffpress.compress.quantization.layer_kinds import channel_axis

SMOOTHED: tuple[type[nn.Module], ...] = (nn.Linear,)
CONCAT_ALPHA = 0.5
LEAST_SHARE = 1e-3  # lower limit of a channel's maximum, as a fraction of the largest over channels

Vectors = dict[str, torch.Tensor]


def smoothing_vectors(
    dataset: CalibrationData, graph: LayerGraph, formats: Mapping[str, str], config: QuantizeConfig
) -> Vectors:
    """Return layer -> s, float32 [in], for the layers that `smoothquant` and `split_concats` apply to.

    These have quantized inputs in `formats`, layer -> format name. The states are evaluated once for this, before the
    scales of the smoothed tensors are calibrated.
    """
    modules: dict[str, Any] = dict(dataset.model.named_modules())
    quantized_inputs = [name for name, kind in formats.items() if FORMATS[kind].activations]
    candidates = [name for name in quantized_inputs if getattr(modules[name], "groups", 1) == 1]
    smoothed = {name for name in candidates if config.smoothquant and isinstance(modules[name], SMOOTHED)}
    chosen = [
        group
        for group in graph.shared_inputs(candidates)
        if group[0] in smoothed or (config.split_concats and group[0] in graph.concats)
    ]
    largest = {group[0]: torch.zeros(modules[group[0]].weight.shape[1]) for group in chosen}
    observers = {
        f"{name}.input": partial(_update_max_, largest[group[0]], channel_axis(modules[name]))
        for group in chosen
        for name in group
    }
    if observers:
        dataset.observe("smooth", observers, largest)
    found: Vectors = {}
    for group in chosen:
        x = largest[group[0]]
        w = torch.stack([_input_channel_max(modules[name].weight) for name in group]).amax(0)
        if group[0] in smoothed and config.smoothquant:
            s = vector(x, w, config.smoothquant.alpha)
        else:
            widths = graph.concats[group[0]]
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
