"""compress/evaluation/evaluate.py: layout of the result, the floor, and refused inputs."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import diffpress as dp
from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.compress.checkpoint import Checkpoint
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.evaluate import evaluate, paired, real_floor, sampled_features
from diffpress.compress.evaluation.features import FeatureNetwork, Reference, load_features, load_reference
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.runtime.errors import InvalidInputError


def embed(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return five weighted sums of pixels as features, and logits that always predict label 1."""
    projection = np.random.default_rng(0).standard_normal((64, 5)).astype(np.float32)
    return images.reshape(-1, 64) @ projection, np.eye(3, dtype=np.float32)[np.ones(len(images), dtype=int)]


FAKE = FeatureNetwork("fake", "f" * 64, embed)


@pytest.fixture(scope="module")
def reference() -> Reference:
    real = np.random.default_rng(1).uniform(-1, 1, (80, 1, 8, 8)).astype(np.float32)
    return Reference(embed(real)[0], {"file": "real.npz", "sha256": "r" * 64, "images": 80})


def subject_of(checkpoint: Checkpoint) -> EvaluationSubject:
    return EvaluationSubject(TorchNetwork(checkpoint.model, checkpoint.spec), checkpoint.spec)


def scored(checkpoint: Checkpoint, reference: Reference, **settings: Any) -> dict[str, Any]:
    config = EvaluateConfig(**{"samples": 12, "seeds": 3, "batch": 5, **settings})
    return evaluate(subject_of(checkpoint), config, FAKE, reference)


def test_the_result_has_the_documented_shape(unet: Checkpoint, reference: Reference) -> None:
    result = scored(unet, reference)
    assert json.loads(json.dumps(result, allow_nan=False)) == result
    assert list(result) == ["samples", "seeds", "features", "frechet", "kid", "paired", "label_accuracy", "reference"]
    assert (result["samples"], result["seeds"], result["paired"]) == (12, 3, None)
    assert set(result["features"]) == {"name", "sha256"} and set(result["kid"]) == {"mean", "sd"}
    assert set(result["frechet"]) == {"mean", "sd", "floor"}
    assert result["label_accuracy"] == pytest.approx(1 / 3)  # labels are 0, 1, 2 in turn, the prediction is 1
    assert result["reference"] == reference.source


def test_an_unconditional_model_has_no_label_accuracy(plain: Checkpoint, reference: Reference) -> None:
    assert scored(plain, reference)["label_accuracy"] is None


def test_scores_are_deterministic_and_do_not_depend_on_the_batch(unet: Checkpoint, reference: Reference) -> None:
    one, two = scored(unet, reference, batch=5), scored(unet, reference, batch=12)
    assert one["frechet"]["mean"] == pytest.approx(two["frechet"]["mean"], rel=1e-4)
    assert scored(unet, reference) == one


def test_seeds_are_independent_and_one_seed_has_no_spread(unet: Checkpoint, reference: Reference) -> None:
    assert scored(unet, reference)["frechet"]["sd"] > 0.0
    assert scored(unet, reference, seeds=1)["frechet"]["sd"] is None


def test_samples_unlike_the_reference_are_warned_of(
    unet: Checkpoint, reference: Reference, caplog: pytest.LogCaptureFixture
) -> None:
    other = Reference(reference.features + 20.0, reference.source)
    scored(unet, other)
    assert "look nothing like the reference real.npz" in caplog.text
    caplog.clear()
    subject = subject_of(unet)
    own = np.concatenate([f for f, _ in sampled_features(subject, EvaluateConfig(samples=40), FAKE, "", [7])])
    scored(unet, Reference(own, reference.source))
    assert "look nothing like" not in caplog.text


def test_the_floor_is_positive_and_falls_with_the_number_of_samples(reference: Reference) -> None:
    floors = [real_floor(reference.features, samples, 5) for samples in (8, 20, 40)]
    assert floors[0] > floors[1] > floors[2] > 0.0


def test_too_few_reference_images_are_refused(unet: Checkpoint, reference: Reference) -> None:
    with pytest.raises(
        InvalidInputError, match=r"81 samples require at least as many reference images, real.npz has 80"
    ):
        scored(unet, reference, samples=81)


def test_the_floor_uses_at_most_half_of_the_reference(unet: Checkpoint, reference: Reference) -> None:
    assert scored(unet, reference, samples=80)["frechet"]["floor"] == real_floor(reference.features, 40, 3)


def test_paired_metrics_compare_the_same_noise(unet: Checkpoint, quantized: Checkpoint) -> None:
    ours, theirs = subject_of(quantized), subject_of(unet)
    same = paired(theirs, theirs, EvaluateConfig(samples=64, batch=16), "itself")
    other = paired(ours, theirs, EvaluateConfig(samples=64, batch=16), "teacher")
    assert same["against"] == "itself" and same["ssim"] == pytest.approx(1.0, abs=1e-5)
    assert same["psnr_db"] > 100 > other["psnr_db"]


# --- features and references -----------------------------------------------------------------------------------


def test_the_built_in_feature_network_and_reference_match(unet: Checkpoint) -> None:
    spec = replace(unet.spec, sample_shape=(1, 28, 28))
    network = load_features(FEATURES, spec, threads=1)
    features, logits = network.run(np.zeros((2, 1, 28, 28), np.float32))
    stored = load_reference(REFERENCE, network, spec)
    assert logits is not None and logits.shape == (2, 10) and stored.features.shape[1] == features.shape[1]
    assert stored.source["images"] == len(stored.features) == 10_000


def test_a_feature_network_for_other_image_shapes_is_refused(unet: Checkpoint) -> None:
    with pytest.raises(InvalidInputError, match=r"features.onnx: .*\[1, 28, 28\], the model samples \[1, 8, 8\]"):
        load_features(FEATURES, unet.spec)


def test_an_unreadable_feature_network_is_refused(unet: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "net.onnx").write_bytes(b"nothing")
    for name in ("net.onnx", "nowhere.onnx"):
        with pytest.raises(InvalidInputError, match=f"{name}: not readable"):
            load_features(tmp_path / name, unet.spec)


def test_features_of_reference_images_are_computed(unet: Checkpoint, npz: Path) -> None:
    with np.load(npz) as stored:
        x = stored["x"]
    found = load_reference(npz, FAKE, unet.spec)
    np.testing.assert_allclose(found.features, embed(x[:, None].astype(np.float32) / 127.5 - 1.0)[0], atol=1e-4)
    assert found.source["images"] == 48


def test_reference_features_of_another_network_are_refused(unet: Checkpoint, tmp_path: Path) -> None:
    file = tmp_path / "reference.npz"
    np.savez(file, features=np.zeros((9, 5)), features_sha256="other")
    with pytest.raises(
        InvalidInputError, match=r"reference.npz: its features were computed by a network other than fake"
    ):
        load_reference(file, FAKE, unet.spec)


@pytest.mark.parametrize("content", [None, b"", b"not an npz", b"PK\x03\x04 cut off"])
def test_an_unreadable_reference_is_refused(content: bytes | None, unet: Checkpoint, tmp_path: Path) -> None:
    file: Path = tmp_path / "reference.npz"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInputError, match=r"reference.npz: not readable"):
        load_reference(file, FAKE, unet.spec)


def test_reference_images_of_another_size_are_refused(unet: Checkpoint, tmp_path: Path) -> None:
    np.savez(tmp_path / "reference.npz", x=np.zeros((20, 9, 9), np.uint8))
    with pytest.raises(InvalidInputError, match=r"reference.npz: .*\[1, 9, 9\].*\[1, 8, 8\]"):
        load_reference(tmp_path / "reference.npz", FAKE, unet.spec)


# --- models of text --------------------------------------------------------------------------------------------


def test_a_text_model_is_compared_with_another_from_the_same_noise(sd_bundle: Path) -> None:
    settings: dict[str, Any] = {"samples": 8, "seeds": 1, "steps": 2, "engine": "onnxruntime", "threads": 1}
    found = dp.evaluate(sd_bundle, against=sd_bundle, **settings)
    assert found["frechet"] is None and found["samples"] == 8
    assert found["paired"]["psnr_db"] > 100 and found["paired"]["ssim"] == pytest.approx(1.0, abs=1e-4)
    with pytest.raises(InvalidInputError, match=r"no built-in features fit its images; .*--features, or .*--against"):
        dp.evaluate(sd_bundle, **settings)


def test_a_checkpoint_in_torch_gives_the_images_of_its_bundle(
    sd_bundle: Path, tiny_folder: Callable[..., Path]
) -> None:
    found = dp.evaluate(tiny_folder("sd"), against=sd_bundle, samples=8, seeds=1, steps=2, threads=1)
    assert found["paired"]["psnr_db"] > 90
