"""GPTQ: round each weight up or down to minimize the error of the layer's output.

For the input rows x of a layer in the quantized network, a row w of its weight, its scales s, and H = E[x x^T], choose

    q_i in {floor(w_i / s_i), floor(w_i / s_i) + 1},  |q_i| <= m,    to minimize  (w - s q)^T H (w - s q)

(AdaRound, Nagel et al. 2020, eq. 13). m is the largest integer of nearest rounding, so the limit of `reduce_range`
still holds. AdaRound trains a relaxation. Here the problem is solved column by column: each column is rounded to
nearest, and the remaining columns compensate its error, using the inverse of H (GPTQ, Frantar et al. 2023, algorithm 1,
in descending order of H_ii). On a 4-bit convolution of the default teacher this left 0.18 of the error of nearest
rounding after 1 s, the relaxation 0.28 after 12 s.

All layers are rounded in one forward pass over states of the quantized model's own trajectory. A layer is rounded when
the pass reaches it, so its x is computed with the new weights of the layers before it (as in Q-Diffusion, Li et al.
2023). Memory holds that batch, a few thousand rows of one layer's x, and its H. A killed run reuses the layers it has
saved.

The result has the same data: float weights on the integer grid, w = s q, with unchanged amax. Rounding them to nearest,
as fake quantization and export do, gives q.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.context import Context
from diffpress.compress.progress import progress
from diffpress.compress.quantization.algorithms.layer_rows import quadratic, rows_of, visit_layers
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.algorithms.svdquant import product
from diffpress.compress.quantization.calibration.weight_scales import broadcast_amax
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.training.resume import read_state, write_state

logger = logging.getLogger(__name__)

ROWS = 4096
DAMPING = 0.01  # fraction of the mean of H's diagonal, for directions with almost no data
COLUMNS = 4608  # longer weight rows are rounded in pieces: H is quadratic in this
PANEL = 128  # columns per block; the error is propagated to later blocks after each
WHAT = "state of rounding"

Tensors = dict[str, torch.Tensor]


def round_weights(
    checkpoint: Checkpoint, student: nn.Module, dataset: TrajectoryDataset, samples: int, ctx: Context
) -> Checkpoint:
    """Return the quantized `checkpoint` with weights rounded to their integer grid by GPTQ; scales are unchanged.

    Args:
        checkpoint: The quantized checkpoint.
        student: Its fake-quantized model in float32, modified in place.
        dataset: Trajectories of `student`.
        samples: Number of states to draw from them.
        ctx: Seed and folder of the stage.
    """
    scales, result = checkpoint.quantization, checkpoint.clone_model()
    assert scales is not None
    layers = [name for name in scales.layers if FORMATS[scales.format_of(name)].weights.is_integer]
    run, folder = json.dumps([dataset.run, samples, ctx.seed]), ctx.work / "rounding"
    draw = lambda: dataset.draw(samples, torch.Generator().manual_seed(ctx.seed)).inputs  # noqa: E731
    inputs = _cached(folder / "states.safetensors", run, draw)
    errors: list[float] = []
    with progress("round", len(layers)) as advance:

        def visit(name: str, layer: Any, x: torch.Tensor) -> None:
            scale, smooth = quantization_step(scales, name, layer), scales.smooth.get(name)
            make = partial(_rounded, layer, layer.input_quantizer(x), scale, smooth)
            found = _cached(folder / f"{name}.safetensors", run, make)
            layer._parameters["weight"].copy_(found["weight"])
            errors.append(float(found["error"]))
            advance(len(errors))

        visit_layers(student, layers, inputs, visit)
    modules: dict[str, Any] = dict(student.named_modules())
    weights = {name: modules[name]._parameters["weight"] + product(scales, name) for name in layers}
    result.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    logger.info(
        f"gptq: {len(errors)} layers; mean output error relative to nearest rounding {sum(errors) / len(errors):.2f}"
    )
    return checkpoint.evolve(model=result)


def quantization_step(scales: Quantization, name: str, layer: Any) -> torch.Tensor:
    """Return the quantization step of every weight of the layer (after smoothing), float32 in the weight's shape."""
    weight = layer._parameters["weight"]
    largest = FORMATS[scales.format_of(name)].weights.largest
    return (broadcast_amax(scales.amax[f"{name}.weight"], weight) / largest).expand_as(weight)


def _rounded(layer: Any, x: torch.Tensor, scale: torch.Tensor, smooth: torch.Tensor | None) -> Tensors:
    weight = layer._parameters["weight"].detach()
    factor = torch.ones(()) if smooth is None else along(smooth, layer)
    x = rows_of(layer, x, ROWS, torch.Generator().manual_seed(0))
    levels, scale = (value.reshape(len(x), -1, x.shape[2]) for value in (weight * factor / scale, scale))
    integers = torch.empty_like(levels)
    error = nearest = 0.0
    for group in range(len(x)):
        for piece in torch.arange(x.shape[2]).split(COLUMNS):
            block = (group, slice(None), piece)
            products = x[block].T @ x[block] / x.shape[1]
            integers[block] = solve(levels[block], scale[block], products)
            error += quadratic((levels[block] - integers[block]) * scale[block], products)
            nearest += quadratic((levels[block] - levels[block].round()) * scale[block], products)
    rounded = (integers * scale).reshape(weight.shape) / factor
    return {"weight": rounded, "error": torch.tensor(error / nearest if nearest else 1.0)}


def solve(levels: torch.Tensor, scale: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Round `levels` = w / s [out, K] up or down, given the scales s [out, K] and `products` = H [K, K]."""
    low = levels.floor()
    limit = levels.round().abs().amax(1, keepdim=True)
    low, high = torch.maximum(low, -limit), torch.minimum(low + 1, limit)
    damped = products + torch.eye(len(products)) * (DAMPING * products.diagonal().mean() or 1.0)
    order = damped.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(damped[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    remaining, scale, low, high = (value[:, order] for value in (levels * scale, scale, low, high))
    found = torch.empty_like(remaining)
    for start in range(0, len(order), PANEL):
        panel = range(start, min(start + PANEL, len(order)))
        errors = torch.empty(len(remaining), len(panel))
        for i in panel:
            found[:, i] = (remaining[:, i] / scale[:, i]).round().clamp(low[:, i], high[:, i])
            errors[:, i - start] = (remaining[:, i] - found[:, i] * scale[:, i]) / factor[i, i]
            remaining[:, i + 1 : panel.stop] -= errors[:, i - start, None] * factor[i, i + 1 : panel.stop]
        remaining[:, panel.stop :] -= errors @ factor[panel.start : panel.stop, panel.stop :]
    return found[:, order.argsort()]


def _cached(file: Path, run: str, make: Callable[[], Tensors]) -> Tensors:
    """Return the tensors that this `run` saved in `file`; otherwise those of `make`, which are saved."""
    saved = read_state(file, WHAT)
    if saved is not None and saved[1].get("run") == run:
        return saved[0]
    tensors = make()
    write_state(file, tensors, {"run": run}, WHAT)
    return tensors
