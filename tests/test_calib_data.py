"""The shipped data matches the manifest and behaves as its README describes."""

import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from diffusers import AutoencoderKL, DDPMPipeline, StableDiffusionPipeline

from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.sampler import generate

DATA = Path(__file__).parents[1] / "calib_data"
MANIFEST = json.loads((DATA / "MANIFEST.json").read_text(encoding="utf-8"))
NULL_LABEL = 10


@pytest.fixture(scope="module")
def calibration() -> dict[str, np.ndarray]:
    with np.load(DATA / "calibration.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    with np.load(DATA / "reference.npz", allow_pickle=False) as file:
        return dict(file)


def run_network(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    session = onnxruntime.InferenceSession(DATA / "features.onnx", providers=["CPUExecutionProvider"])
    return session.run(["features", "logits"], {"sample": x[:, None].astype(np.float32) / 127.5 - 1.0})


def test_manifest_lists_every_data_file_and_no_other() -> None:
    files = {path.relative_to(DATA).as_posix() for path in DATA.rglob("*") if path.is_file()}
    assert files - {"README.md", "MANIFEST.json"} == set(MANIFEST)


@pytest.mark.parametrize("name", MANIFEST)
def test_file_matches_size_and_hash_in_the_manifest_and_the_readme(name: str) -> None:
    content, entry = (DATA / name).read_bytes(), MANIFEST[name]
    assert len(content) == entry["bytes"]
    assert hashlib.sha256(content).hexdigest() == entry["sha256"]
    (row,) = [line for line in (DATA / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert entry["sha256"] in row and f"{entry['bytes']:,}" in row and entry["licence"] in row
    assert entry["licence"] in ("MIT", "Apache-2.0", "MIT AND Apache-2.0") and entry["source"]


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in DATA.rglob("*") if path.is_file()) <= 45 * 10**6
    assert sum(path.stat().st_size for path in (DATA / "icons" / "teacher").rglob("*") if path.is_file()) <= 25 * 10**6


def test_calibration_images_are_balanced_over_the_classes(calibration: dict[str, np.ndarray]) -> None:
    x, y = calibration["x"], calibration["y"]
    assert x.dtype == y.dtype == np.uint8 and (x.shape, y.shape) == ((2048, 28, 28), (2048,))
    assert set(np.bincount(y, minlength=10).tolist()) == {204, 205}
    assert len({image.tobytes() for image in x}) == 2048
    assert np.bincount(y[:256], minlength=10).min() >= 10  # shuffled: a prefix contains every class


def test_prompts_are_200_different_lines_of_2_to_60_words() -> None:
    prompts = (DATA / "prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(prompts) == len(set(prompts)) == 200
    assert all(prompt and prompt == " ".join(prompt.split()) for prompt in prompts)
    lengths = [len(prompt.split()) for prompt in prompts if prompt.isascii()]
    assert min(lengths) == 2 and 50 <= max(lengths) <= 60


def test_teacher_is_a_complete_pipeline_with_finite_output() -> None:
    pipeline = DDPMPipeline.from_pretrained(DATA / "teacher")
    assert pipeline.scheduler.config.prediction_type == "v_prediction"
    assert pipeline.unet.config.num_class_embeds == NULL_LABEL + 1
    assert sum(p.numel() for p in pipeline.unet.parameters()) == pytest.approx(3.48e6, rel=0.01)
    sample = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        v = pipeline.unet(sample, torch.tensor([999, 500]), class_labels=torch.tensor([0, NULL_LABEL])).sample
    assert v.shape == sample.shape
    assert torch.isfinite(v).all()


def test_teacher_predicts_the_velocity_of_real_images_by_class(calibration: dict[str, np.ndarray]) -> None:
    """At t = 800 the label matters because noise hides the image: the right label must beat a wrong one."""
    pipeline = DDPMPipeline.from_pretrained(DATA / "teacher")
    rng = torch.Generator().manual_seed(0)
    clean = torch.from_numpy(calibration["x"][:64, None]).float() / 127.5 - 1.0
    y, t = torch.from_numpy(calibration["y"][:64]).long(), torch.full((64,), 800)
    noise = torch.randn(clean.shape, generator=rng)
    target = pipeline.scheduler.get_velocity(clean, noise, t)
    with torch.no_grad():
        noisy = pipeline.scheduler.add_noise(clean, noise, t)
        right, wrong = ((pipeline.unet(noisy, t, class_labels=k).sample - target).square().mean()
                        for k in (y, (y + 5) % 10))  # fmt: skip
    assert right < 0.5 * wrong
    assert right < 0.2 * target.square().mean()


def test_student_is_smaller_and_samples_the_requested_class_in_two_steps() -> None:
    student = load_checkpoint(str(DATA / "student"))
    assert (student.spec.plan.solver, student.spec.plan.steps) == ("consistency", 2)
    assert sum(p.numel() for p in student.model.parameters()) < 1.4e6
    assert {record.stage for record in student.history} == {"prune", "distill"}
    labels = np.arange(100) % NULL_LABEL
    network = TorchNetwork(student.model, student.spec)
    images = generate(network, student.spec, range(100), labels)
    _, logits = run_network((images[:, 0] + 1.0) * 127.5)
    assert (logits.argmax(1) == labels).mean() >= 0.75


def test_feature_network_recognises_the_calibration_images(calibration: dict[str, np.ndarray]) -> None:
    """Detects a damaged file only, since these are training images; the README has the held-out accuracy."""
    _, logits = run_network(calibration["x"])
    assert (logits.argmax(1) == calibration["y"]).mean() >= 0.92


def test_feature_network_is_independent_of_the_batch_size(calibration: dict[str, np.ndarray]) -> None:
    x = calibration["x"][:7]
    together, _ = run_network(x)
    alone = np.concatenate([run_network(image[None])[0] for image in x])
    assert together.shape == (7, 64)
    np.testing.assert_allclose(together, alone, rtol=1e-4, atol=1e-5)  # float32 sums in a different order


def test_feature_network_is_one_small_standard_onnx_file() -> None:
    model = onnx.load(DATA / "features.onnx", load_external_data=False)
    assert (DATA / "features.onnx").stat().st_size <= 2 * 10**6
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 18)]
    assert not any(tensor.external_data for tensor in model.graph.initializer)
    assert "BatchNormalization" not in {node.op_type for node in model.graph.node}
    assert b".py" not in model.SerializeToString()  # the exporter's metadata with local paths is removed


def test_reference_moments_are_those_of_its_features(reference: dict[str, np.ndarray]) -> None:
    features = reference["features"].astype(np.float64)
    assert reference["features"].dtype == np.float16 and features.shape == (10000, 64)
    assert np.bincount(reference["labels"]).tolist() == [1000] * 10
    # float16 has 11 significant bits, so the relative error of a feature, and of sums of them, is at most 2^-11.
    np.testing.assert_allclose(reference["mean"], features.mean(axis=0), rtol=2**-11, atol=1e-6)
    covariance = np.cov(features, rowvar=False, ddof=1)
    scale = np.sqrt(np.outer(*[(features**2).mean(axis=0)] * 2))
    assert np.all(np.abs(reference["covariance"] - covariance) <= 2**-9 * scale)
    assert np.linalg.eigvalsh(reference["covariance"]).min() > 0


def test_reference_records_the_hash_of_its_feature_network(reference: dict[str, np.ndarray]) -> None:
    assert str(reference["features_sha256"]) == MANIFEST["features.onnx"]["sha256"]


def test_calibration_images_lie_close_to_the_reference_in_feature_space(
    reference: dict[str, np.ndarray], calibration: dict[str, np.ndarray]
) -> None:
    """Training and test images are from one data set: the means differ by little compared with the spread."""
    features, _ = run_network(calibration["x"])
    distance = np.square(features.mean(axis=0) - reference["mean"]).sum()
    assert distance < 0.01 * np.trace(reference["covariance"])


# --- the text-to-image teacher and its data ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def captioned() -> tuple[np.ndarray, list[str]]:
    with np.load(DATA / "icons" / "calibration.npz", allow_pickle=False) as file:
        return file["x"], file["caption"].tolist()


def lines(name: str) -> list[str]:
    return (DATA / "icons" / name).read_text(encoding="utf-8").splitlines()


def test_held_out_prompts_are_combinations_that_no_calibration_image_has(
    captioned: tuple[np.ndarray, list[str]],
) -> None:
    images, captions = captioned
    prompts, names = lines("prompts.txt"), lines("names.txt")
    assert images.shape == (512, 64, 64, 3) and images.dtype == np.uint8 and len(set(captions)) == 512
    assert len(set(prompts)) == 200 and set(prompts).isdisjoint(captions)
    assert len(set(names)) == 1140 and len(lines("captions.txt")) == 1140
    # the style, a name and the colour
    for text in (*prompts, *captions, *lines("captions.txt")):
        style, _, rest = text.partition(" ")
        name, _, _ = rest.rpartition(" on ")
        assert style in ("flat", "shaded") and name in names


def test_the_text_to_image_teacher_follows_the_colour_of_a_prompt() -> None:
    """A few steps give the background its colour."""
    pipeline = StableDiffusionPipeline.from_pretrained(DATA / "icons" / "teacher")
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    prompts = ["flat waffle on red", "shaded cinema on black", "flat waffle on blue"]
    assert prompts[0] in lines("prompts.txt") and prompts[1] in lines("prompts.txt")
    images = pipeline(prompts, num_inference_steps=6, guidance_scale=3.0, generator=generator, output_type="np").images
    corners = images[:, (0, 0, -1, -1), (0, -1, 0, -1)].mean(axis=1)
    colours = np.array([(214, 64, 69), (20, 20, 24), (66, 133, 244)]) / 255
    assert np.abs(corners - colours).max() < 0.15


def test_the_autoencoder_reconstructs_calibration_images(captioned: tuple[np.ndarray, list[str]]) -> None:
    vae = AutoencoderKL.from_pretrained(DATA / "icons" / "teacher" / "vae")
    pixels = torch.from_numpy(captioned[0][:64]).permute(0, 3, 1, 2).float() / 127.5 - 1
    with torch.no_grad():
        output = vae.decode(vae.encode(pixels).latent_dist.mean).sample.clamp(-1, 1)
    psnr = -10 * ((output - pixels) / 2).square().mean(dim=(1, 2, 3)).log10()
    assert psnr.mean() > 28.0
