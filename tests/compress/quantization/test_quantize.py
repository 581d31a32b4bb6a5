"""compress/quantization/quantize.py: scales match the observed magnitudes; fake quantization matches its formula."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.context import Context
from diffpress.compress.evaluation.metrics import sqnr_db
from diffpress.compress.models.adapter import adapter_for
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.config import QuantizeConfig
from diffpress.compress.quantization.quantize import quantize
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.seeds import CALIBRATION_SEED
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.sampler import generate, noise_for
from tests.compress.quantization.scales import scales_of


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"samples": 4, "batch": 4, **settings})


@pytest.fixture
def small(custom_files: Callable[..., tuple[Path, Path]]) -> Checkpoint:
    """A small custom module: first, time, norm, inner, last; `inner` computes in int8."""
    file, weights = custom_files("v")
    return load_checkpoint(f"{file}:{weights}")


@pytest.mark.parametrize(("reduced", "factor"), [(True, 127 / 64), (False, 1.0)])
def test_a_weight_scale_is_the_largest_magnitude_of_its_channel(
    reduced: bool, factor: float, unet: Checkpoint, context: Callable[..., Context]
) -> None:
    found = scales_of(quantize(unet, config(reduce_range=reduced), context(unet)))
    modules: dict[str, Any] = dict(unet.model.named_modules())
    assert len(found.layers) > 20
    for name in found.layers:
        weight = modules[name].weight.detach().numpy()
        # the range is reduced only where integers are multiplied
        expected = np.abs(weight.reshape(len(weight), -1)).max(1) * (factor if f"{name}.input" in found.amax else 1.0)
        np.testing.assert_allclose(found.amax[f"{name}.weight"].numpy(), expected, rtol=1e-6)


def test_an_input_scale_is_the_largest_magnitude_on_the_models_own_trajectory(
    small: Checkpoint, context: Callable[..., Context]
) -> None:
    largest = []
    model: Any = small.clone_model()
    model.inner.register_forward_pre_hook(lambda _, args: largest.append(args[0].abs().max().item()))
    generate(TorchNetwork(model, small.spec), small.spec, range(CALIBRATION_SEED, CALIBRATION_SEED + 6), batch=3)
    found = scales_of(quantize(small, config(samples=6, batch=3, calibration="max"), context(small)))
    assert found.amax["inner.input"].item() == max(largest)


@pytest.mark.parametrize("calibration", ["max", "percentile", "mse", "entropy", "step_means"])
def test_every_calibration_method_keeps_the_output_close_to_the_float_one(
    calibration: str, small: Checkpoint, context: Callable[..., Context], output: Callable[[Checkpoint], torch.Tensor]
) -> None:
    checkpoint = quantize(small, config(calibration=calibration), context(small))
    # the smallest of the steps' means clips the other steps
    assert sqnr_db(output(small).numpy(), output(checkpoint).numpy()) > (15.0 if calibration == "step_means" else 25.0)


def test_a_lower_percentile_gives_a_smaller_amax(small: Checkpoint, context: Callable[..., Context]) -> None:
    amaxes = [
        scales_of(quantize(small, config(calibration={"percentile": p}), context(small))).amax["inner.input"].item()
        for p in (90.0, 99.0, 100.0)
    ]
    assert amaxes[0] < amaxes[1] < amaxes[2]


def q(x: torch.Tensor, amax: torch.Tensor) -> torch.Tensor:
    scale = amax / 127
    return torch.clamp(torch.round(x / scale), -128, 127) * scale  # int8 saturates like this in every engine


@pytest.mark.parametrize("outputs", [True, False])
@pytest.mark.parametrize("reduced", [True, False])
def test_fake_quantization_matches_the_formula(
    reduced: bool, outputs: bool, small: Checkpoint, context: Callable[..., Context]
) -> None:
    checkpoint = quantize(
        small, config(reduce_range=reduced, outputs=outputs, calibration={"percentile": 95.0}), context(small)
    )
    model: Any = fake_quantized(checkpoint)
    float_model: Any = small.model
    seen: dict[str, torch.Tensor] = {}
    model.inner.register_forward_hook(lambda _, args, out: seen.update(x=args[0], out=out))
    with torch.no_grad():
        model(torch.randn(3, 1, 8, 8) * 3, torch.tensor([1, 20, 49]))
        amax, layer = scales_of(checkpoint).amax, float_model.inner
        assert seen["x"].abs().max() > amax["inner.input"]  # some values are clipped
        weight = q(layer.weight, amax["inner.weight"].view(-1, 1, 1, 1))
        expected = F.conv2d(q(seen["x"], amax["inner.input"]), weight, layer.bias, padding=1)
    assert ("inner.output" in amax) == outputs
    if outputs:
        expected = q(expected, amax["inner.output"])
    torch.testing.assert_close(seen["out"], expected, atol=1e-5, rtol=1e-5)
    integers = (weight / amax["inner.weight"].view(-1, 1, 1, 1) * 127).round().abs().max().item()
    assert integers == (64 if reduced else 127)


def test_calibration_evaluates_exactly_the_timesteps_of_the_plan(
    unet: Checkpoint, context: Callable[..., Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen, samples = [], []

    class Spy(TorchNetwork):
        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            seen.append((set(inputs["timestep"].tolist()), len(inputs["sample"]), inputs["class_labels"].tolist()))
            samples.append(inputs["sample"])
            return super().run(inputs)

    monkeypatch.setattr("diffpress.compress.quantization.trajectory_dataset.TorchNetwork", Spy)
    quantize(unet, config(samples=5, batch=3), context(unet))
    plan = [round(t) for t in unet.spec.plan.timesteps]
    assert [t for ts, _, _ in seen for t in ts] == plan + plan  # two batches
    assert [size for _, size, _ in seen] == [3] * 4 + [2] * 4
    assert seen[0][2] + seen[4][2] == [0, 1, 2, 0, 1]
    noise = noise_for(range(CALIBRATION_SEED, CALIBRATION_SEED + 5), (1, 8, 8))  # calibration has its own seeds
    np.testing.assert_allclose(np.concatenate([samples[0], samples[4]]), noise, rtol=1e-5)


def test_quantizing_twice_gives_the_same_hash_and_does_not_change_the_input(
    pruned: Checkpoint, quantized: Checkpoint, context: Callable[..., Context], unet: Checkpoint
) -> None:
    before = pruned.hash
    assert quantize(pruned, config(), context(unet)).hash == quantized.hash != before
    assert pruned.evolve().hash == before  # evolve() drops the cached hash
    assert pruned.quantization is None
    fake_quantized(quantized)
    assert quantized.evolve().hash == quantized.hash
    assert not any("quantizer" in name for name, _ in pruned.model.named_modules())
    assert not any("quantizer" in name for name, _ in quantized.model.named_modules())


def test_the_quantized_output_stays_close_to_the_float_one(
    quantized: Checkpoint, pruned: Checkpoint, output: Callable[[Checkpoint], torch.Tensor]
) -> None:
    noisy, exact = output(quantized).numpy(), output(pruned).numpy()
    assert 15.0 < sqnr_db(exact, noisy) < 60.0


def test_fake_quantization_of_a_checkpoint_without_scales_is_its_own_model(plain: Checkpoint) -> None:
    assert fake_quantized(plain) is plain.model


# --- layer selection -------------------------------------------------------------------------------------------


def test_sensitive_layers_compute_in_float_and_only_linear_ones_are_stored_as_integers(quantized: Checkpoint) -> None:
    amax, sensitive_layers = scales_of(quantized).amax, adapter_for(quantized.model).sensitive_layers(quantized.model)
    assert not any(f"{name}.input" in amax for name in sensitive_layers)
    assert "time_embedding.linear_1.weight" in amax and "conv_in.weight" not in amax and "conv_out.weight" not in amax
    assert "mid_block.resnets.0.conv1.input" in amax and "mid_block.attentions.0.to_q.input" in amax


def test_only_the_configured_kinds_of_layers_compute_in_integers(
    unet: Checkpoint, context: Callable[..., Context]
) -> None:
    amax = scales_of(quantize(unet, config(layers=("conv",)), context(unet))).amax
    assert "mid_block.resnets.0.conv1.input" in amax and "mid_block.resnets.0.conv1.output" in amax
    assert "mid_block.attentions.0.to_q.weight" in amax and "mid_block.attentions.0.to_q.input" not in amax


def test_outputs_of_weight_only_layers_are_not_quantized(quantized: Checkpoint) -> None:
    amax = scales_of(quantized).amax
    assert "mid_block.resnets.0.conv1.output" in amax and "mid_block.attentions.0.to_q.output" in amax
    assert "time_embedding.linear_1.weight" in amax and "time_embedding.linear_1.output" not in amax


def test_ignored_layers_have_no_scales(unet: Checkpoint, context: Callable[..., Context]) -> None:
    prefixes = ("mid_block.attentions", "time_embedding.linear_1")
    layers = scales_of(quantize(unet, config(ignored_layers=prefixes), context(unet))).layers
    assert not any(name.startswith(prefixes) for name in layers)
    assert "mid_block.resnets.0.conv1" in layers and "time_embedding.linear_2" in layers


def test_an_ignored_layer_that_does_not_exist_is_refused(unet: Checkpoint, context: Callable[..., Context]) -> None:
    with pytest.raises(InvalidInputError, match=r"ignored_layers: no layer name .* starts with 'up_blocks\.7'"):
        quantize(unet, config(ignored_layers=("up_blocks.7",)), context(unet))
