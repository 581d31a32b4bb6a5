"""How good are the samples: two kinds of figures, never one alone.

distributional   Frechet distance and KID of N samples to the reference, in a named feature network, for each of K
                 seeds, and the floor: the same distance for N real images against the others, for half of
                 them where N is more
paired           the same noise and labels through this model and another: PSNR and SSIM of the images

The feature network only ever scores; nothing is trained on it or selected by it.
"""

from __future__ import annotations

import statistics
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from compress.config import EvaluateConfig
from compress.data import read_npz
from compress.metrics import frechet_distance, kernel_distance, kernel_within, moments, psnr_db, ssim
from compress.progress import progress
from runtime.bundle import sha256
from runtime.denoise import Network
from runtime.errors import BadInput
from runtime.sampler import generate, generate_batches, labels_in_turn
from runtime.spec import DenoiserSpec, Plan

SEED_STRIDE = 10_000_000  # sample i of seed s starts from the noise of seed s * stride + i


@dataclass(frozen=True)
class Reference:
    """Features [M, D] of real images, where they come from, and what they were made with."""

    features: np.ndarray
    source: dict[str, Any]

    @cached_property
    def kernel_within(self) -> float:
        """The part of a KID that is the reference's alone."""
        return kernel_within(self.features)


@dataclass(frozen=True)
class FeatureNetwork:
    """`run(images float32 [N, C, H, W])` -> features [N, D], logits [N, classes]."""

    name: str
    sha256: str
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]


def load_features(path: Path, spec: DenoiserSpec, threads: int | None = None) -> FeatureNetwork:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads or 0
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's error types are private
        raise BadInput(f"{path}: not readable as a feature network ({str(error).splitlines()[0]})") from error
    if not spec.is_pixel_space:
        raise BadInput(
            "evaluate scores models of pixels; sample the bundle of a model of latents, and score the images elsewhere"
        )
    shape = tuple(session.get_inputs()[0].shape[1:])
    if shape != tuple(spec.sample_shape):
        raise BadInput(
            f"{path}: this feature network sees images {list(shape)}, the model makes {list(spec.sample_shape)}; "
            "give one that fits with --features NET.onnx (input 'sample', outputs 'features' and 'logits')"
        )

    def run(images: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        features, logits = session.run(["features", "logits"], {"sample": images})
        return features, logits

    return FeatureNetwork(path.name, sha256(path), run)


def load_reference(path: Path, network: FeatureNetwork, spec: DenoiserSpec) -> Reference:
    """Stored features made with this network, or images, which are put through it here."""
    try:
        with np.load(path, allow_pickle=False) as file:
            stored = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise BadInput(f"{path}: not readable as npz ({error})") from error
    if "features" in stored:
        if str(stored.get("features_sha256")) != network.sha256:
            raise BadInput(
                f"{path}: its features were made by another network than {network.name}; give images instead"
            )
        features = stored["features"].astype(np.float64)
    else:
        images, _ = read_npz(path)
        if images.shape[1:] != tuple(spec.sample_shape):
            raise BadInput(f"{path}: images are {list(images.shape[1:])}, the model makes {list(spec.sample_shape)}")
        low, high = spec.data_range
        scaled = [
            images[i : i + 256].astype(np.float32) * ((high - low) / 255.0) + low for i in range(0, len(images), 256)
        ]
        features = np.concatenate([network.run(part)[0] for part in scaled]).astype(np.float64)
    return Reference(features, {"file": path.name, "sha256": sha256(path), "images": len(features)})


def evaluate(
    network: Network,
    spec: DenoiserSpec,
    config: EvaluateConfig,
    features: FeatureNetwork,
    reference: Reference,
    plan: Plan | None = None,
    what: str = "evaluate",
) -> dict[str, Any]:
    """Sample `config.samples` images for each of `config.seeds` seeds and score them, as `evaluate --json` shows it."""
    labels = labels_in_turn(spec, config.samples)
    if config.samples > len(reference.features):
        raise BadInput(
            f"{config.samples} samples need at least as many reference images, "
            f"{reference.source['file']} has {len(reference.features)}"
        )
    real = moments(reference.features)
    distances, kids, hits = [], [], []
    with progress(what, config.seeds * config.samples) as advance:
        for seed in range(config.seeds):
            seeds = np.arange(config.samples) + (seed + 1) * SEED_STRIDE
            found, guessed = [], []
            for images in generate_batches(network, spec, seeds, labels, plan, config.batch):
                embedded, logits = features.run(images)
                found.append(embedded)
                guessed.append(logits.argmax(1))
                advance(seed * config.samples + sum(map(len, found)))
            sampled = np.concatenate(found)
            distances.append(frechet_distance(*moments(sampled), *real))
            kids.append(kernel_distance(sampled, reference.features, reference.kernel_within))
            if labels is not None:
                hits.append(float((np.concatenate(guessed) == labels).mean()))
    return {
        "samples": config.samples,
        "seeds": config.seeds,
        "features": {"name": features.name, "sha256": features.sha256},
        "frechet": {**_spread(distances), "floor": real_floor(reference.features, config.samples, config.seeds)},
        "kid": _spread(kids),
        "paired": None,
        "label_accuracy": statistics.fmean(hits) if hits else None,
        "reference": reference.source,
    }


def real_floor(features: np.ndarray, samples: int, seeds: int) -> float:
    """Frechet distance of `samples` real images, half of them at most, to the others, mean over `seeds` draws.

    No model is told below it.
    """
    floors, samples = [], min(samples, len(features) // 2)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(features))
        floors.append(frechet_distance(*moments(features[order[:samples]]), *moments(features[order[samples:]])))
    return statistics.fmean(floors)


def paired(
    network: Network, other: Network, spec: DenoiserSpec, config: EvaluateConfig, against: str
) -> dict[str, Any]:
    """PSNR and SSIM between the images that two networks make of the same noise and labels by the spec's plan.

    Corrections in the plan are those of `network`.
    """
    seeds = np.arange(config.samples)
    ours = generate(network, spec, seeds, batch=config.batch)
    theirs = generate(other, spec, seeds, plan=spec.plan.uncorrected, batch=config.batch)
    span = spec.data_range[1] - spec.data_range[0]
    return {"against": against, "psnr_db": psnr_db(theirs, ours, span), "ssim": ssim(theirs, ours, span)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
