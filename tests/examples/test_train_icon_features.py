"""examples/train_icon_features.py: a tiny run writes encoders that `evaluate` reads, equal to torch's."""

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

import diffpress as dp
from diffpress.compress.evaluation.features import load_features
from tests.examples.made_icons import NAMES, save_icons


@pytest.fixture(scope="module")
def scripts(examples: None) -> ModuleType:
    import train_icon_features

    return train_icon_features


def test_a_tiny_run_writes_encoders_of_images_and_prompts(scripts: ModuleType, tmp_path: Path) -> None:
    save_icons(tmp_path / "icons.npz")
    options = ["--batch", "8", "--steps", "2", "--device", "cpu"]
    scripts.main(["--icons", str(tmp_path / "icons.npz"), "--out", str(tmp_path / "out"), *options])
    schedule = dp.betas_schedule("linear", 10)
    spec = dp.DenoiserSpec("v", schedule, (3, 64, 64), dp.make_plan("ddim", 1, schedule))
    network = load_features(tmp_path / "out" / "model.onnx", spec)
    assert network.embed_text is not None and network.embed_text(list(NAMES)).shape == (len(NAMES), scripts.EMBEDDING)
    images = np.random.default_rng(0).uniform(-1, 1, (3, 3, 64, 64)).astype(np.float32)
    features, logits = network.run(images)
    assert features.shape == (3, scripts.EMBEDDING) and np.isfinite(features).all() and logits is None


def test_the_loss_falls_to_zero_for_equal_embeddings_and_ignores_pairs_of_the_same_name(scripts: ModuleType) -> None:
    vectors = torch.eye(4)
    scale = torch.tensor(3.0)
    none, pair = torch.zeros(4, 4, dtype=torch.bool), torch.zeros(4, 4, dtype=torch.bool)
    assert scripts.contrastive_loss(vectors, vectors, scale, none).item() < 1e-3
    vectors[1] = vectors[0]  # two images of one name: indistinguishable, but no negatives of each other
    pair[0, 1] = pair[1, 0] = True
    assert scripts.contrastive_loss(vectors, vectors, scale, none).item() == pytest.approx(np.log(2) / 2, abs=1e-3)
    assert scripts.contrastive_loss(vectors, vectors, scale, pair).item() < 1e-3


def test_augmentation_changes_images_a_little_and_reproducibly(scripts: ModuleType) -> None:
    images = np.full((4, 3, 16, 16), 128, np.uint8)
    first, second = (scripts.augmented(images, np.random.default_rng(0)) for _ in range(2))
    assert np.array_equal(first, second) and first.dtype == np.float32
    assert 0 < np.abs(first).max() < 0.5
