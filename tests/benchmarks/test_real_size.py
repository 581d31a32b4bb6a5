"""benchmarks/real_size.py: its network predicts something, so a trajectory is stable and parity means something."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from diffpress.compress.evaluation.metrics import mean_sqnr_db
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.denoiser import plan_denoiser
from diffpress.runtime.network_inputs import dummy_conditioning
from diffpress.runtime.sampler import noise_for, sample

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "real_size.py"


@pytest.fixture(scope="module")
def real_size() -> ModuleType:
    spec = importlib.util.spec_from_file_location("real_size", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_convolution_is_a_product_with_the_patches(real_size: ModuleType) -> None:
    generator = torch.Generator().manual_seed(0)
    layer = torch.nn.Conv2d(5, 4, 3, padding=1)
    assert layer.bias is not None
    x = torch.randn(2, 5, 6, 7, generator=generator)
    solved = np.concatenate([layer.weight.detach().numpy().transpose(2, 3, 1, 0).reshape(45, 4), [layer.bias.tolist()]])
    expected = layer(x).detach().numpy().transpose(0, 2, 3, 1).reshape(-1, 4)
    np.testing.assert_allclose(real_size.patches_of(x.numpy()) @ solved, expected, atol=1e-5)


def test_the_data_are_smooth_fields_of_unit_variance(real_size: ModuleType) -> None:
    fields = real_size.gaussian_fields(np.random.default_rng(0), 64, (4, 16, 16))
    assert fields.std() == pytest.approx(1.0, abs=0.05)
    assert np.mean(fields * np.roll(fields, 1, axis=3)) > 0.9


def test_tensors_of_a_file_are_replaced_in_place_in_their_dtype(real_size: ModuleType, tmp_path: Path) -> None:
    before = {"a": torch.ones(3, 2), "b": torch.full((2, 2), 7.0, dtype=torch.bfloat16), "c": torch.arange(3.0)}
    save_file(before, tmp_path / "w.safetensors")
    real_size.overwrite(tmp_path / "w.safetensors", {"b": np.full((2, 2), 0.5), "c": np.zeros(3)})
    after = load_file(tmp_path / "w.safetensors")
    assert torch.equal(after["a"], before["a"]) and torch.equal(after["c"], torch.zeros(3))
    assert torch.equal(after["b"], torch.full((2, 2), 0.5, dtype=torch.bfloat16))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_a_small_perturbation_of_the_noise_stays_small(
    name: str, real_size: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(real_size, "POSITIONS", 2**15)
    real_size.write(name, "small", tmp_path / name)
    explained = real_size.fit(name, "small", tmp_path / name)["explained_on_other_samples"]
    assert max(explained.values()) > 0.4
    checkpoint = real_size.loaded(name, tmp_path / name)
    spec = checkpoint.spec
    denoise = plan_denoiser(TorchNetwork(checkpoint.model, spec), spec, dummy_conditioning(spec, 2))
    noise, other = (noise_for(range(start, start + 2), spec.sample_shape) for start in (0, 100))
    samples = []
    for started in (noise, noise + np.float32(1e-3) * other):
        *_, last = sample(denoise, started, spec.schedule, spec.plan)
        samples.append(last.x)
    assert 0.3 < samples[0].std() < 3.0 and mean_sqnr_db(*samples) > 50.0  # 60 dB is the perturbation itself


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_the_small_scale_runs_all_steps_and_resumes(name: str, tmp_path: Path) -> None:
    def run() -> list[dict[str, object]]:
        command = [sys.executable, str(SCRIPT), name, "--scale", "small", "--work", str(tmp_path)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    machine, *rows = run()
    assert set(machine) == {"cpu", "cores", "vnni"}
    assert [row["step"] for row in rows] == ["write", "fit", "quantize", "export"]
    assert all(float(str(row["seconds"])) > 0 and int(str(row["peak_mib"])) > 0 for row in rows)
    parity = rows[-1]["parity"]
    assert isinstance(parity, dict) and all(row["sqnr_db"] > 15.0 for row in parity.values())
    assert rows[-1]["failures"] == [] and [row.pop("done_before") for row in run()[1:]] == [True] * 4
