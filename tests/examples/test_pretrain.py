"""examples/pretrain.py: a tiny run writes a loadable pipeline, and a stopped run resumes exactly."""

import argparse
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline
from safetensors.torch import load_file

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def pretrain(examples: None) -> Iterator[ModuleType]:
    import pretrain

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pretrain, "GRID_STEPS", 2)  # sampling would take longer than training
        yield pretrain


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("images") / "images.npz"
    np.savez(path, x=rng.integers(0, 256, (64, 8, 8), dtype=np.uint8), y=np.arange(64, dtype=np.uint8) % 10)
    return path


@pytest.fixture(scope="module")
def stopped(pretrain: ModuleType, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of four steps that was stopped after two."""
    out = tmp_path_factory.mktemp("stopped")
    assert not run(pretrain, images, out, "--steps", "4", "--stop-at", "2")
    return out


def run(pretrain: ModuleType, images: Path, out: Path, *options: str) -> dict[str, torch.Tensor]:
    """Run the script as from the command line; return the weights it wrote, empty if it stopped early."""
    pretrain.main(["--images", str(images), "--out", str(out), "--batch", "8", "--device", "cpu", *options])
    weights = out / "unet" / "diffusion_pytorch_model.safetensors"
    return load_file(weights) if weights.exists() else {}


def test_a_tiny_run_writes_a_pipeline_with_finite_output(pretrain: ModuleType, images: Path, tmp_path: Path) -> None:
    run(pretrain, images, tmp_path, "--steps", "3")
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    sample, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([999, 10])
    with torch.no_grad():
        v = pipeline.unet(sample, t, class_labels=torch.tensor([3, 10])).sample  # 10 is the null label
    assert v.shape == sample.shape
    assert torch.isfinite(v).all()
    assert (tmp_path / "samples" / "training_000003.png").stat().st_size > 0


def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(
    pretrain: ModuleType, images: Path, stopped: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(stopped, tmp_path / "resumed")
    uninterrupted = run(pretrain, images, tmp_path / "uninterrupted", "--steps", "4")
    resumed = run(pretrain, images, copy, "--steps", "4", "--resume")
    assert uninterrupted.keys() == resumed.keys()
    assert all(torch.equal(uninterrupted[name], resumed[name]) for name in uninterrupted)
    states = [torch.load(tmp_path / name / "training.pt", weights_only=True) for name in ("uninterrupted", "resumed")]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in uninterrupted)
    # the pipeline has the EMA weights
    assert any(not torch.equal(uninterrupted[name], states[0]["model"][name]) for name in uninterrupted)


def test_a_run_can_be_extended_before_its_learning_rate_falls(
    pretrain: ModuleType, images: Path, stopped: Path, tmp_path: Path
) -> None:
    # of 4 steps the learning rate is constant up to the third, of 10 up to the eighth
    copy = shutil.copytree(stopped, tmp_path / "extended")
    run(pretrain, images, copy, "--steps", "10", "--stop-at", "3", "--resume")
    run(pretrain, images, tmp_path / "whole", "--steps", "10", "--stop-at", "3")
    states = [torch.load(folder / "training.pt", weights_only=True) for folder in (copy, tmp_path / "whole")]
    assert all(torch.equal(states[0]["model"][name], states[1]["model"][name]) for name in states[0]["model"])


def test_a_run_stops_after_its_minutes(pretrain: ModuleType, images: Path, tmp_path: Path) -> None:
    run(pretrain, images, tmp_path, "--steps", "1000", "--minutes", "1e-9")
    assert torch.load(tmp_path / "training.pt", weights_only=True)["step"] == 1


def test_color_images_without_labels_train_an_unconditional_network(pretrain: ModuleType, tmp_path: Path) -> None:
    x = np.random.default_rng(0).integers(0, 256, (16, 8, 12, 3), dtype=np.uint8)
    np.savez(tmp_path / "color.npz", x=x)
    run(pretrain, tmp_path / "color.npz", tmp_path / "out", "--steps", "1")
    config = json.loads((tmp_path / "out" / "unet" / "config.json").read_text())
    assert (config["in_channels"], config["sample_size"], config["num_class_embeds"]) == (3, [8, 12], None)


def test_network_and_scheduler_match_the_shipped_teacher(pretrain: ModuleType) -> None:
    teacher = ROOT / "calib_data" / "teacher"
    for built, path in (
        (pretrain.build_unet((1, 28, 28), 10), "unet/config.json"),
        (pretrain.build_scheduler(), "scheduler/scheduler_config.json"),
    ):
        shipped = json.loads((teacher / path).read_text())
        ours = json.loads(built.to_json_string())
        assert {key: ours.get(key) for key in shipped if not key.startswith("_")} == {
            key: value for key, value in shipped.items() if not key.startswith("_")
        }


def test_the_loss_is_the_mean_square_of_the_error_of_v(pretrain: ModuleType) -> None:
    """A network that always outputs 0 has the loss E |v|^2, computed here with numpy."""
    scheduler = pretrain.build_scheduler()
    x = np.full((4, 1, 8, 8), 255, np.uint8)  # x_0 = 1 everywhere
    unet = pretrain.build_unet((1, 8, 8), None)
    for parameter in unet.conv_out.parameters():
        torch.nn.init.zeros_(parameter)
    rng = np.random.default_rng([5, 1, 0])
    noise = rng.standard_normal(x.shape, dtype=np.float32).astype(np.float64)
    alpha = scheduler.alphas_cumprod.double().numpy()[rng.integers(0, 1000, 4)][:, None, None, None]
    v = np.sqrt(alpha) * noise - np.sqrt(1 - alpha)
    loss = pretrain.loss_of_step(unet, scheduler, x, None, 0, argparse.Namespace(seed=5, batch=4))
    assert loss.item() == pytest.approx((v**2).mean(), rel=1e-4)  # float32 against float64


def test_a_run_starts_from_the_weights_of_init(pretrain: ModuleType, images: Path, tmp_path: Path) -> None:
    before = run(pretrain, images, tmp_path / "first", "--steps", "1")
    after = run(
        pretrain, images, tmp_path / "second", "--steps", "1", "--lr", "1e-12", "--init", str(tmp_path / "first")
    )
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    with pytest.raises(SystemExit, match="no usable unet"):
        run(pretrain, images, tmp_path / "third", "--steps", "1", "--init", str(images.parent))


def test_every_image_is_used_once_per_epoch(pretrain: ModuleType) -> None:
    epoch = np.concatenate([pretrain.indices(step, 64, 8, seed=0) for step in range(8)])
    assert sorted(epoch) == list(range(64))
    assert not np.array_equal(pretrain.indices(0, 64, 8, seed=0), pretrain.indices(8, 64, 8, seed=0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--steps", "4", "--lr", "1", "--resume"], "made with other settings"),
        (["--steps", "1"], "pass --resume"),
        (["--steps", "1", "--resume"], "is at step 2 already"),
        (["--steps", "4", "--resume", "--init", "somewhere"], "--init is for a new run"),
        (["--steps", "4", "--minutes", "0"], "--minutes must be above 0"),
        (["--batch", "65", "--resume"], "more than the 64 images"),
        (["--steps", "0"], "--steps must be at least 1"),
    ],
)
def test_invalid_options_exit_with_a_one_line_error(
    pretrain: ModuleType, images: Path, stopped: Path, options: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match=message):
        run(pretrain, images, stopped, *options)


def test_a_file_that_is_not_npz_exits_with_a_one_line_error(pretrain: ModuleType, tmp_path: Path) -> None:
    (tmp_path / "text.npz").write_text("not an archive")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(SystemExit, match=name):
            run(pretrain, tmp_path / name, tmp_path / "out", "--steps", "1")
    np.savez(tmp_path / "ok.npz", x=np.zeros((8, 8, 8), np.uint8))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "training.pt").write_bytes(b"broken")
    with pytest.raises(SystemExit, match="not a checkpoint"):
        run(pretrain, tmp_path / "ok.npz", tmp_path / "out", "--steps", "1", "--resume")
