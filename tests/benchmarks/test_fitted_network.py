"""benchmarks/fitted_network.py: the networks predict something, so a trajectory is stable and SQNR means something."""

from __future__ import annotations

from pathlib import Path

import fitted_network
import numpy as np
import pytest
import torch
from real_size_models import MODELS
from safetensors.torch import load_file, save_file

from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.denoiser import plan_denoiser
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.sampler import noise_for, sample


def test_a_convolution_is_a_product_with_its_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(5, 4, 3, padding=1)
    x = torch.randn(2, 5, 6, 7, generator=generator)
    solution = np.random.default_rng(0).standard_normal((46, 4))
    weight, bias = fitted_network.fitted_layer(layer, solution, channels=4)
    layer.weight.data, layer.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()  # type: ignore[union-attr]
    expected = fitted_network.targets_of(layer(x).detach().numpy(), x.numpy())
    np.testing.assert_allclose(fitted_network.rows_of(x.numpy()) @ solution, expected, atol=1e-4)


def test_the_last_layer_of_a_dit_predicts_patches_and_keeps_its_variance() -> None:
    layer = torch.nn.Linear(5, 2 * 2 * 8)
    before = layer.weight.detach().clone().reshape(4, 8, 5)
    tokens = torch.randn(3, 4 * 6, 5, generator=torch.Generator().manual_seed(0))
    solution = np.random.default_rng(0).standard_normal((6, 2 * 2 * 4))
    weight, bias = fitted_network.fitted_layer(layer, solution, channels=4)
    layer.weight.data, layer.bias.data = torch.tensor(weight).float(), torch.tensor(bias).float()
    # as DiTTransformer2DModel puts patches together
    out = torch.einsum("nhwpqc->nchpwq", layer(tokens).reshape(3, 4, 6, 2, 2, 8)).reshape(3, 8, 8, 12)
    expected = fitted_network.targets_of(out[:, :4].detach().numpy(), tokens.numpy())
    np.testing.assert_allclose(fitted_network.rows_of(tokens.numpy()) @ solution, expected, atol=1e-4)
    assert torch.equal(layer.weight.reshape(4, 8, 5)[:, 4:], before[:, 4:])


def test_r2_is_one_for_the_targets_and_zero_for_zeros() -> None:
    rows, targets = np.eye(4), np.random.default_rng(0).standard_normal((4, 2))
    assert fitted_network.r2([(rows, targets), (rows, targets)], targets) == 1.0
    assert fitted_network.r2([(rows, targets)], np.zeros((4, 2))) == 0.0
    # of 1 + 9, the second pair's 9 are not explained
    assert fitted_network.r2([(rows, targets), (rows, 3.0 * targets)], targets) == pytest.approx(1.0 - 4.0 / 10.0)


def test_the_data_are_smooth_fields_of_unit_variance() -> None:
    fields = fitted_network.gaussian_fields(np.random.default_rng(0), 512, (4, 16, 16))
    assert fields.std() == pytest.approx(1.0, abs=0.05)
    assert np.mean(fields * np.roll(fields, 1, axis=3)) > 0.9


def test_tensors_of_a_file_are_replaced_in_place_in_their_dtype(tmp_path: Path) -> None:
    before = {"a": torch.ones(3, 2), "b": torch.full((2, 2), 7.0, dtype=torch.bfloat16), "c": torch.arange(3.0)}
    save_file(before, tmp_path / "w.safetensors")
    fitted_network.overwrite(tmp_path / "w.safetensors", {"b": np.full((2, 2), 0.5), "c": np.zeros(3)})
    after = load_file(tmp_path / "w.safetensors")
    assert torch.equal(after["a"], before["a"]) and torch.equal(after["c"], torch.zeros(3))
    assert torch.equal(after["b"], torch.full((2, 2), 0.5, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_network_explains_half_of_v_and_a_small_perturbation_of_the_noise_stays_small(
    name: str, tmp_path: Path
) -> None:
    model = MODELS[name]
    fitted_network.write_network(model, True, tmp_path)
    assert fitted_network.fit_network(model, tmp_path)["r2"] >= 0.5
    checkpoint = fitted_network.load_network(model, tmp_path)
    spec = checkpoint.spec
    denoise = plan_denoiser(TorchNetwork(checkpoint.model, spec), spec, dummy_conditioning(spec, 2))
    noise, other = (noise_for(range(start, start + 2), spec.sample_shape) for start in (0, 100))
    samples = []
    for started in (noise, noise + np.float32(1e-3) * other):
        *_, last = sample(denoise, started, spec.schedule, spec.plan)
        samples.append(last.x)
    assert 0.3 < samples[0].std() < 3.0 and mean_sqnr_db(*samples) > 50.0  # 60 dB is the perturbation itself
