"""AWQ (Lin et al. 2024, eq. 4 and 5): scale 4-bit weights so that channels with large activations get finer steps.

    w x = (w diag(s)) (x / s),    s_j = mean |x_j|^a,    a in [0, 1] to minimize  E |w x - q(w diag(s)) (x / s)|^2

q rounds to nearest, and x are input rows on states of the model's own trajectory. Layers that read the same tensor
share s and a, so that the tensor is divided once. All layers are searched in one forward pass of the float model;
memory holds that batch and a few thousand rows of one layer's x. The geometric mean of s is normalized to 1, as a
common factor has no effect. modelopt's awq_lite uses one vector per layer and was no better on a linear layer (error
0.128 to 0.122).
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from diffpress.compress.quantization.algorithms.layer_rows import quadratic, rows_of, visit_layers
from diffpress.compress.quantization.calibration.weight_scales import broadcast_amax, weight_amax
from diffpress.compress.quantization.formats import FORMATS, INT4, Format
from diffpress.compress.quantization.layer_graph import LayerGraph
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset

logger = logging.getLogger(__name__)

ROWS = 4096
EXPONENTS = torch.arange(0.0, 1.01, 0.05).tolist()
TINY = torch.finfo(torch.float32).tiny
LEAST_SHARE = 1e-4  # lower limit of a channel's mean magnitude, as a fraction of the mean over channels

Vectors = dict[str, torch.Tensor]


def awq_vectors(
    dataset: TrajectoryDataset, graph: LayerGraph, formats: Mapping[str, str], samples: int, seed: int
) -> Vectors:
    """Return layer -> s, float32 [in], for linear layers with 4-bit weights, from `samples` drawn states."""
    model = copy.deepcopy(dataset.model).float().eval()
    modules: dict[str, Any] = dict(model.named_modules())
    candidates = [
        name for name, kind in formats.items() if FORMATS[kind].weights is INT4 and isinstance(modules[name], nn.Linear)
    ]
    if not candidates:
        return {}
    group = {name: members for members in graph.shared_inputs(candidates) for name in members}
    found: Vectors = {}
    gains: list[float] = []

    def visit(name: str, layer: Any, x: torch.Tensor) -> None:
        if name in found:
            return
        weights = [(modules[member].weight.detach(), FORMATS[formats[member]]) for member in group[name]]
        x = rows_of(layer, x, ROWS, torch.Generator().manual_seed(0))[0]
        s, gain = best_vector(x, weights)
        gains.append(gain)
        found.update(dict.fromkeys(group[name], s.cpu()))

    visit_layers(model, candidates, dataset.draw(samples, torch.Generator().manual_seed(seed)).inputs, visit)
    mean = sum(gains) / len(gains)
    logger.info(f"awq: {len(found)} linear layers; mean output error relative to unscaled {mean:.2f}")
    return found


def best_vector(x: torch.Tensor, weights: list[tuple[torch.Tensor, Format]]) -> tuple[torch.Tensor, float]:
    """Search s [in] for input rows x [N, in] shared by all `weights` [out, in].

    Returns:
        s, and its output error relative to the error without scaling.
    """
    products, mean = x.T @ x, x.abs().mean(0)
    mean = mean.clamp(min=float(LEAST_SHARE * mean.mean()) or 1.0)
    errors, vectors = [], []
    for exponent in EXPONENTS:
        s = mean**exponent
        s = s / s.log().mean().exp()
        weight_errors = [weight - nearest(weight * s, form) / s for weight, form in weights]
        errors.append(sum(quadratic(error, products) for error in weight_errors))
        vectors.append(s)
    best = min(range(len(errors)), key=errors.__getitem__)
    return vectors[best], errors[best] / errors[0] if errors[0] else 1.0


def nearest(weight: torch.Tensor, form: Format) -> torch.Tensor:
    """Round `weight` to nearest in an integer format, with the scales that calibration would give it."""
    scale = broadcast_amax(weight_amax(weight, form), weight) / form.weights.largest
    return (weight / scale.clamp(min=TINY)).round() * scale
