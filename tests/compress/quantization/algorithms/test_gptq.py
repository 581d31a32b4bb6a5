"""compress/quantization/algorithms/gptq.py: rounds up or down by output error; the result is on the integer grid."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.quantization.algorithms import gptq
from diffpress.compress.quantization.algorithms.gptq import solve
from diffpress.compress.quantization.algorithms.layer_rows import quadratic, rows_of
from diffpress.compress.quantization.algorithms.smoothquant import along
from diffpress.compress.quantization.calibration.weight_scales import broadcast_amax
from diffpress.compress.quantization.config import GPTQConfig, QuantizeConfig
from diffpress.compress.quantization.formats import FORMATS
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.quantization.trajectory_dataset import TrajectoryDataset
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from tests.compress.quantization.scales import scales_of

PTQ: dict[str, Any] = {"samples": 4, "batch": 4, "output_correction": False}
GPTQ: dict[str, Any] = {"samples": 16}


@pytest.fixture
def small(custom_files: Callable[..., tuple[Path, Path]]) -> Checkpoint:
    """A small custom module: first, time, norm, inner, last; `inner` computes in integers."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


def nearest_and_gptq(
    checkpoint: Checkpoint, context: Callable[..., Context], **settings: Any
) -> tuple[Checkpoint, Checkpoint]:
    ctx = context(checkpoint)
    nearest = quantize(checkpoint, QuantizeConfig(**PTQ, **settings), ctx)
    return nearest, quantize(checkpoint, QuantizeConfig(**PTQ, **settings, gptq=GPTQ), ctx)


# --- the problem -----------------------------------------------------------------------------------------------


def problem(seed: int, out: int = 5, k: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Levels, scales and products of rows with correlated entries."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randn(out, k, generator=generator) * 3
    scale = (torch.rand(out, 1, generator=generator) + 0.5).expand(-1, k)
    x = torch.randn(200, k, generator=generator) + 2 * torch.randn(200, 1, generator=generator)
    return levels, scale, x.T @ x / 200


def best_error(levels: torch.Tensor, scale: torch.Tensor, products: torch.Tensor) -> float:
    """The smallest error over all combinations of rounding up or down."""
    total = 0.0
    for level, s in zip(levels, scale, strict=True):
        limit = level.round().abs().max()
        candidates = torch.tensor(list(itertools.product((0.0, 1.0), repeat=len(level)))) + level.floor()
        candidates = candidates[(candidates.abs() <= limit).all(1)]
        error = (level - candidates) * s
        total += float(((error @ products) * error).sum(1).min())
    return total


def test_rounding_is_close_to_the_optimum_and_goes_up_or_down_only() -> None:
    ratios = []
    for seed in range(20):
        levels, scale, products = problem(seed)
        found = solve(levels, scale, products)
        assert torch.equal(found, found.round()) and (found - levels).abs().max() < 1.0
        assert (found.abs() <= levels.round().abs().amax(1, keepdim=True)).all()
        errors = [quadratic((levels - q) * scale, products) for q in (found, levels.round())]
        ratios.append(np.array(errors) / best_error(levels, scale, products))
    ours, nearest = np.mean(ratios, axis=0)
    assert 1.0 - 1e-5 <= ours < 1.3 and nearest > 2.0


def test_uncorrelated_inputs_give_nearest_rounding() -> None:
    levels, scale, _ = problem(0)
    assert torch.equal(solve(levels, scale, torch.rand(7).diag()), levels.round())


def test_no_integer_exceeds_the_largest_of_nearest_rounding() -> None:
    levels, scale, products = torch.tensor([[7.4, 7.4, 1.2], [-7.4, -7.4, 8.3]]), torch.ones(2, 3), torch.ones(3, 3)
    found = solve(levels, scale, products)
    assert found[0].max() == 7  # without the limit, 7 and 8 would compensate each other
    assert found[1].min() == -8


def test_the_error_is_propagated_between_panels(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, scale, products = problem(1, k=40)
    single_panel = solve(levels, scale, products)
    monkeypatch.setattr(gptq, "PANEL", 7)
    assert torch.equal(solve(levels, scale, products), single_panel)


def test_a_layer_with_all_zero_inputs_uses_nearest_rounding() -> None:
    levels, scale, _ = problem(0)
    assert torch.equal(solve(levels, scale, torch.zeros(7, 7)), levels.round())


LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "conv": (nn.Conv2d(6, 8, 3, padding=1, bias=False), (6, 5, 7)),
    "strided": (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2), bias=False), (6, 8, 7)),
    "grouped": (nn.Conv2d(6, 8, 3, groups=2, padding="same", padding_mode="reflect", bias=False), (6, 5, 7)),
    "tokens": (nn.Linear(6, 8, bias=False), (5, 6)),
    "vector": (nn.Linear(6, 8, bias=False), (6,)),
}


@pytest.mark.parametrize("kind", LAYERS)
def test_rows_times_weight_give_the_layers_output(kind: str) -> None:
    layer, shape = LAYERS[kind]
    x = torch.randn(3, *shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out = layer(x)
        out = out.flatten(2).transpose(1, 2) if out.dim() == 4 else out.reshape(3, -1, 8)  # [3, pixels or tokens, 8]
        rows = rows_of(layer, x, 10**6, torch.Generator().manual_seed(0))
        found = rows @ layer.weight.reshape(len(rows), 8 // len(rows), -1).transpose(1, 2)
        found = found.transpose(0, 1).reshape(3, -1, 8)
    for ours, theirs in zip(found, out, strict=True):  # rows of one state come in any order
        torch.testing.assert_close(ours[ours[:, 0].argsort()], theirs[theirs[:, 0].argsort()])
    few = rows_of(layer, x, 6, torch.Generator().manual_seed(0))
    assert few.shape[1] == (3 if kind == "vector" else 6)


# --- the result is data ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "dtype"),
    [
        ({"format": "int4"}, torch.float32),
        ({"format": "int8"}, torch.float32),
        ({"format": "int8", "reduce_range": False}, torch.bfloat16),
        ({"format": "w4a8", "smoothquant": {"alpha": 0.5}}, torch.float32),
        ({"format": "w4a8", "smoothquant": {"alpha": 0.5}, "keep_sensitive_layers": False}, torch.bfloat16),
    ],
    ids=str,
)
def test_rounding_the_result_to_nearest_changes_nothing(
    settings: dict[str, Any], dtype: torch.dtype, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    narrow = unet.evolve(model=unet.clone_model().to(dtype))
    nearest, found = nearest_and_gptq(narrow, context, **settings)
    scales, changed = scales_of(found), 0
    assert scales.amax.keys() == scales_of(nearest).amax.keys()
    assert all(torch.equal(scales.amax[key], scales_of(nearest).amax[key]) for key in scales.amax)
    before: dict[str, Any] = dict(nearest.model.named_modules())
    after: dict[str, Any] = dict(found.model.named_modules())
    for name in scales.layers:
        weight, old = (layers[name].weight.detach().float() for layers in (after, before))
        assert after[name].weight.dtype == dtype
        smooth = along(scales.smooth[name], after[name]) if name in scales.smooth else 1.0
        largest = FORMATS[scales.format_of(name)].weights.largest
        levels, nearest_levels = (
            w * smooth / (broadcast_amax(scales.amax[f"{name}.weight"], w) / largest) for w in (weight, old)
        )
        # bfloat16 has a relative error of 2^-8: just below half a step at 127
        assert (levels - levels.round()).abs().max() < (1e-3 if dtype == torch.float32 else 0.497)
        assert (levels.round() - nearest_levels).abs().max() < 1.0 + 1e-3
        assert levels.round().abs().max() <= nearest_levels.round().abs().max()
        changed += int((levels.round() != nearest_levels.round()).sum())
    assert changed > 1000
    assert not any("quantizer" in name for name in after)
    untouched = set(before) - set(scales.layers)
    assert all(torch.equal(after[n].weight, before[n].weight) for n in untouched if hasattr(after[n], "weight"))


@pytest.mark.parametrize("settings", [{"format": "int4", "smoothquant": {"alpha": 0.5}}], ids=str)
def test_fake_quantization_reproduces_the_rounded_weights(
    settings: dict[str, Any], unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = nearest_and_gptq(unet, context, **settings)[1]
    model, rounded = fake_quantized(found), 0
    for name in scales_of(found).layers:
        layer: Any = model.get_submodule(name)
        weight = layer.weight.detach()
        smooth = layer.weight_quantizer.pre_quant_scale
        exact = weight if smooth is None else weight * smooth
        torch.testing.assert_close(layer.weight_quantizer(weight), exact, rtol=1e-5, atol=1e-7)
        rounded += 1
    assert rounded > 20


@pytest.mark.parametrize(("form", "pieces", "gain"), [("w4a8", True, 1.0), ("int4", False, 2.0)])
def test_outputs_are_closer_to_the_float_models(
    form: str,
    pieces: bool,
    gain: float,
    unet: Checkpoint,
    context: Callable[..., Context],
    output: Callable[[Checkpoint], torch.Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if pieces:
        monkeypatch.setattr(gptq, "COLUMNS", 100)
    before, after = (
        sqnr_db(output(unet).numpy(), output(c).numpy()) for c in nearest_and_gptq(unet, context, format=form)
    )
    assert after > before + gain  # on states not used for rounding


def test_the_same_seed_gives_the_same_hash_and_does_not_change_the_input(
    small: Checkpoint, context: Callable[..., Context]
) -> None:
    before = small.hash
    first, second = (nearest_and_gptq(small, context, format="w4a8")[1] for _ in range(2))
    assert first.hash == second.hash and small.evolve().hash == before


class KilledError(Exception):
    pass


def test_a_killed_run_reuses_the_layers_it_has_finished(
    unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    config, ctx = QuantizeConfig(**PTQ, format="w4a8", gptq=GPTQ), context(unet)
    undisturbed = quantize(unet, config, replace(ctx, work=tmp_path / "undisturbed"))
    solved: list[int] = []

    def killing(*arguments: torch.Tensor) -> torch.Tensor:
        if len(solved) == 5:
            raise KilledError
        solved.append(1)
        return solve(*arguments)

    def counting(*arguments: torch.Tensor) -> torch.Tensor:
        solved.append(1)
        return solve(*arguments)

    monkeypatch.setattr(gptq, "solve", killing)
    with pytest.raises(KilledError):
        quantize(unet, config, ctx)
    monkeypatch.setattr(gptq, "solve", counting)
    with monkeypatch.context() as patched:
        patched.setattr(TrajectoryDataset, "draw", lambda *_: pytest.fail("the states were saved already"))
        assert quantize(unet, config, ctx).hash == undisturbed.hash
        layers = len(scales_of(undisturbed).layers)
        assert len(solved) == layers
        # a finished run solves nothing again, and another run does not use its files
        quantize(unet, config, ctx)
        assert len(solved) == layers
    quantize(unet, config.model_copy(update={"gptq": GPTQConfig(samples=8)}), ctx)
    assert len(solved) == 2 * layers


def test_an_unreadable_state_file_is_named(small: Checkpoint, context: Callable[..., Context]) -> None:
    ctx = context(small)
    nearest_and_gptq(small, context, format="w4a8")
    (ctx.work / "rounding" / "inner.safetensors").write_bytes(b"not at all")
    with pytest.raises(
        InvalidInputError, match=r"inner\.safetensors: the saved state of rounding cannot be read .*; delete it"
    ):
        quantize(small, QuantizeConfig(**PTQ, format="w4a8", gptq=GPTQ), ctx)


@pytest.mark.parametrize("settings", [{"format": "fp8"}, {"format": "nvfp4"}, {"gptq": {"samples": 0}}])
def test_invalid_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError):
        QuantizeConfig(**{"gptq": True, **settings})
