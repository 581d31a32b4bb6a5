"""Rounding each weight up or down so that the layer's output changes least, as AdaRound asks (Nagel et al. 2020).

With x the rows that a layer of the quantized network multiplies, w a row of its weight, s its scales, H = E[x x^T],

    q_i in {floor(w_i / s_i), floor(w_i / s_i) + 1},  |q_i| <= m,    to minimise  (w - s q)^T H (w - s q)       (eq. 13)

where m is the largest integer there was, so what `reduce_range` promised still holds. AdaRound relaxes this and trains;
here it is solved column by column: each is rounded to what is nearer, and the columns to come take up its error, by the
inverse of H (GPTQ, Frantar et al. 2023, algorithm 1, in the order of falling H_ii). On a 4-bit convolution of the
default teacher that left 0.18 of the error of nearest rounding after 1 s, the relaxation 0.28 after 12 s.

All layers are done in one forward over states of the quantized model's own trajectory: a layer is rounded when the
forward reaches it, so its x is what the layers before it give with their new weights (as in Q-Diffusion, Li et al.
2023). In memory are that batch, a few thousand rows of one layer's x and its H. A run that was killed takes what it had
finished from its folder.

The result is no new kind of data: float weights that lie on the grid, w = s q, beside the same amax. Rounding them to
the nearest, as fake quantization and export do, gives q.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import QuantizeConfig
from diffpress.compress.context import Context, say
from diffpress.compress.progress import progress
from diffpress.compress.quantization.algorithms.layer_rows import quadratic, rows_of, visit_layers
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.algorithms.svdquant import product
from diffpress.compress.quantization.calibration.weight_scales import spread
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import draw, sample_trajectories
from diffpress.compress.training.resume import read_state, write_state

ROWS = 4096
DAMPING = 0.01  # of the mean of H's diagonal, for directions that the rows hardly show
COLUMNS = 4608  # longer rows of weights are rounded in pieces, for H has the square of this
PANEL = 128  # columns after which the error is carried beyond them
WHAT = "state of rounding"

Tensors = dict[str, torch.Tensor]


def round_weights(checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Checkpoint:
    """The quantized `checkpoint` with weights on their integer grid, rounded by what outputs lose; the same scales."""
    scales, result = checkpoint.quantization, checkpoint.clone_model()
    assert scales is not None
    layers = [name for name in scales.layers if FORMATS[scales.format_of(name)].weights.is_integer]
    run = json.dumps([checkpoint.hash, config.model_dump(mode="json"), ctx.seed])
    student: Any = fake_quantized(checkpoint.evolve(model=checkpoint.clone_model().float()))
    folder = ctx.work / "rounding"
    inputs = _kept(folder / "states.safetensors", run, partial(_states, student, checkpoint, config, ctx))
    errors: list[float] = []
    with progress("round", len(layers)) as advance:

        def visit(name: str, layer: Any, x: torch.Tensor) -> None:
            scale, smooth = integer_step(scales, name, layer), scales.smooth.get(name)
            make = partial(_rounded, layer, layer.input_quantizer(x), scale, smooth)
            found = _kept(folder / f"{name}.safetensors", run, make)
            layer._parameters["weight"].copy_(found["weight"])
            errors.append(float(found["error"]))
            advance(len(errors))

        visit_layers(student, layers, inputs, visit)
    modules: dict[str, Any] = dict(student.named_modules())
    weights = {name: modules[name]._parameters["weight"] + product(scales, name) for name in layers}
    result.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()}, strict=False)
    say(f"rounded {len(errors)} layers: their error is {sum(errors) / len(errors):.2f} of that of nearest rounding")
    return checkpoint.evolve(model=result)


def integer_step(scales: Quantization, name: str, layer: Any) -> torch.Tensor:
    """The size of one integer for every weight of the layer (after smoothing), float32 in the weight's shape."""
    weight = layer._parameters["weight"]
    largest = FORMATS[scales.format_of(name)].weights.largest
    return (spread(scales.amax[f"{name}.weight"], weight) / largest).expand_as(weight)


def _states(student: Any, checkpoint: Checkpoint, config: QuantizeConfig, ctx: Context) -> Tensors:
    calls = sample_trajectories(student, checkpoint, config.samples, config.batch, ctx)
    return draw(calls, config.rounding_samples, torch.Generator().manual_seed(ctx.seed))


def _rounded(layer: Any, x: torch.Tensor, scale: torch.Tensor, smooth: torch.Tensor | None) -> Tensors:
    weight = layer._parameters["weight"].detach()
    factor = torch.ones(()) if smooth is None else along(smooth, layer)
    x = rows_of(layer, x, ROWS, torch.Generator().manual_seed(0))
    levels, scale = (value.reshape(len(x), -1, x.shape[2]) for value in (weight * factor / scale, scale))
    integers = torch.empty_like(levels)
    error = nearest = 0.0
    for group in range(len(x)):
        for piece in torch.arange(x.shape[2]).split(COLUMNS):
            part = (group, slice(None), piece)
            products = x[part].T @ x[part] / x.shape[1]
            integers[part] = solve(levels[part], scale[part], products)
            error += quadratic((levels[part] - integers[part]) * scale[part], products)
            nearest += quadratic((levels[part] - levels[part].round()) * scale[part], products)
    rounded = (integers * scale).reshape(weight.shape) / factor
    return {"weight": rounded, "error": torch.tensor(error / nearest if nearest else 1.0)}


def solve(levels: torch.Tensor, scale: torch.Tensor, products: torch.Tensor) -> torch.Tensor:
    """Integers next to `levels` = w / s [out, K], of scales s [out, K], by `products` = H [K, K]."""
    low = levels.floor()
    most = levels.round().abs().amax(1, keepdim=True)
    low, high = torch.maximum(low, -most), torch.minimum(low + 1, most)
    damped = products + torch.eye(len(products)) * (DAMPING * products.diagonal().mean() or 1.0)
    order = damped.diagonal().argsort(descending=True)
    factor = torch.linalg.cholesky(damped[order][:, order])
    factor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    left, scale, low, high = (value[:, order] for value in (levels * scale, scale, low, high))
    found = torch.empty_like(left)
    for start in range(0, len(order), PANEL):
        panel = range(start, min(start + PANEL, len(order)))
        errors = torch.empty(len(left), len(panel))
        for i in panel:
            found[:, i] = (left[:, i] / scale[:, i]).round().clamp(low[:, i], high[:, i])
            errors[:, i - start] = (left[:, i] - found[:, i] * scale[:, i]) / factor[i, i]
            left[:, i + 1 : panel.stop] -= errors[:, i - start, None] * factor[i, i + 1 : panel.stop]
        left[:, panel.stop :] -= errors @ factor[panel.start : panel.stop, panel.stop :]
    return found[:, order.argsort()]


def _kept(file: Path, run: str, make: Callable[[], Tensors]) -> Tensors:
    """The tensors that this `run` left in `file`, or else those of `make`, which are then left there."""
    saved = read_state(file, WHAT)
    if saved is not None and saved[1].get("run") == run:
        return saved[0]
    tensors = make()
    write_state(file, tensors, {"run": run}, WHAT)
    return tensors
