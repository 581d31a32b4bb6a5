"""Quality of the samples: distributional and paired metrics.

distributional   Frechet distance and KID of N samples to the reference, in a named feature network, for each of K
                 seeds; and the floor: the Frechet distance of N real images (at most half of them) to the others
paired           PSNR and SSIM between the images of this model and another from the same noise and conditioning
prompt adherence CLIP score and retrieval (prompt_adherence.py), if the feature network has a text encoder and the model
                 is conditioned on text

The feature network is used only for scoring: nothing is trained on it or selected by it.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.features import FeatureNetwork, Reference, load_features, load_reference
from diffpress.compress.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    moments,
    psnr_db,
    ssim,
)
from diffpress.compress.evaluation.prompt_adherence import prompt_adherence
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.progress import progress
from diffpress.compress.seeds import EVALUATION_SEED
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import ConditioningInputs
from diffpress.runtime.sampler import generate_batches
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

# in the built-in features, other images of the reference's kind are 0.02 away, digit-like strokes 0.64, noise 0.9
UNLIKE = 0.5


def evaluate(
    subject: EvaluationSubject,
    config: EvaluateConfig,
    features: FeatureNetwork,
    reference: Reference,
    what: str = "evaluate",
) -> dict[str, Any]:
    """Sample `config.samples` images for each of `config.seeds` seeds and score them.

    Args:
        subject: What is sampled, under its spec's plan.
        config: Number of samples and seeds, batch size.
        features: Feature network.
        reference: Features of real images.
        what: Label of the progress bar.

    Returns:
        The result in the layout of `evaluate --json`; `paired` is None.

    Raises:
        InvalidInputError: There are fewer reference images than samples.
    """
    if config.samples > len(reference.features):
        raise InvalidInputError(
            f"{config.samples} samples require at least as many reference images, "
            f"{reference.source['file']} has {len(reference.features)}"
        )
    labels = subject.labels(config.samples)
    adherence = prompt_adherence(subject.prompts(config.samples), features, config.candidates)
    real = moments(reference.features)
    distances, kids, accuracies, scores, retrieved, means = [], [], [], [], [], []
    for found, logits in sampled_features(subject, config, features, what, range(config.seeds)):
        mean, covariance = moments(found)
        means.append(mean)
        distances.append(frechet_distance(mean, covariance, *real))
        kids.append(kernel_distance(found, reference.features, reference.kernel_within))
        if labels is not None and logits is not None:
            accuracies.append(float((logits.argmax(1) == labels).mean()))
        if adherence is not None:
            scores.append(adherence.clip_score(found))
            retrieved.append(adherence.retrieval(found))
    _warn_if_unlike(np.mean(means, axis=0), real, reference)
    result = {
        "samples": config.samples,
        "seeds": config.seeds,
        "features": {"name": features.name, "sha256": features.sha256},
        "frechet": {**_spread(distances), "floor": real_floor(reference.features, config.samples, config.seeds)},
        "kid": _spread(kids),
        "paired": None,
        "label_accuracy": statistics.fmean(accuracies) if accuracies else None,
        "reference": reference.source,
    }
    if adherence is not None:
        result["clip_score"] = _spread(scores)
        result["retrieval"] = _spread(retrieved) | {"candidates": len(adherence.candidates)}
    return result


def open_features(config: EvaluateConfig, spec: DenoiserSpec, threads: int | None = None) -> FeatureNetwork | None:
    """Open the feature network that was named, else the built-in one; None for latents without a named one.

    Raises:
        InvalidInputError: It does not fit the model's images.
    """
    if config.features is None and not spec.is_pixel_space:
        for file, what in ((config.reference, "a reference needs"), (config.candidates, "candidates need")):
            if file is not None:
                raise InvalidInputError(
                    f"{file}: {what} features of the model's images; name an ONNX image encoder with --features (in a "
                    "recipe evaluate.features)"
                )
        return None
    return load_features(config.features or FEATURES, spec, threads)


def open_reference(
    config: EvaluateConfig,
    features: FeatureNetwork,
    spec: DenoiserSpec,
    baseline: EvaluationSubject | None = None,
    name: str = "",
) -> Reference:
    """Return the reference that was named, else that of the built-in features, else other samples of `baseline`.

    Raises:
        InvalidInputError: There is neither a reference nor a baseline, or the reference does not fit.
    """
    if config.reference is not None or config.features is None:
        return load_reference(config.reference or REFERENCE, features, spec)
    if baseline is None:
        raise InvalidInputError(
            f"{config.features}: features need a reference; name real images with --reference, or a model whose "
            "samples are the reference with --against"
        )
    ((found, _),) = sampled_features(baseline, config, features, f"sampling {name}", seeds=[config.seeds])
    digest = hashlib.sha256(found.tobytes()).hexdigest()
    return Reference(found, {"file": f"samples of {name}", "sha256": digest, "images": len(found)})


def unscored(samples: int, seeds: int) -> dict[str, Any]:
    """Return a result without distributional metrics, for models that no feature network was named for."""
    nothing = dict.fromkeys(("features", "frechet", "kid", "paired", "label_accuracy", "reference"))
    return {"samples": samples, "seeds": seeds, **nothing}


def sampled_features(
    subject: EvaluationSubject,
    config: EvaluateConfig,
    features: FeatureNetwork,
    what: str,
    seeds: Sequence[int],
) -> list[tuple[np.ndarray, np.ndarray | None]]:
    """Return the features [N, D] and logits (or None) of `config.samples` samples for each of the seeds."""
    conditions, sets = subject.conditions(config.samples), []
    with progress(what, len(seeds) * config.samples) as advance:
        for number, seed in enumerate(seeds):
            noise_seeds = np.arange(config.samples) + (seed + 1) * EVALUATION_SEED
            found, predicted = [], []
            for images in _images(subject, noise_seeds, conditions, config.batch):
                embedded, logits = features.run(images)
                found.append(embedded)
                predicted.append(logits)
                advance(number * config.samples + sum(map(len, found)))
            known = [logits for logits in predicted if logits is not None]
            sets.append((np.concatenate(found), np.concatenate(known) if known else None))
    return sets


def real_floor(features: np.ndarray, samples: int, seeds: int) -> float:
    """Return the Frechet distance of `samples` real images (at most half) to the others, mean over `seeds` draws.

    A smaller distance between samples and reference is not meaningful.
    """
    floors, samples = [], min(samples, len(features) // 2)
    for seed in range(seeds):
        order = np.random.default_rng(seed).permutation(len(features))
        floors.append(frechet_distance(*moments(features[order[:samples]]), *moments(features[order[samples:]])))
    return statistics.fmean(floors)


def paired(
    subject: EvaluationSubject, other: EvaluationSubject, config: EvaluateConfig, against: str
) -> dict[str, Any]:
    """Return PSNR and SSIM between the images of two subjects from the same noise and conditioning.

    Both are sampled under `subject`'s plan, whose output corrections and step cache belong to its network alone.
    """
    spec, seeds = subject.spec, np.arange(config.samples)
    plain = other.with_spec(other.spec.with_plan(spec.plan.without_corrections.without_cache))
    ours, theirs = (
        np.concatenate(list(_images(one, seeds, one.conditions(config.samples), config.batch)))
        for one in (subject, plain)
    )
    return {"against": against, **image_agreement(theirs, ours, spec.data_range)}


def _images(
    subject: EvaluationSubject, seeds: np.ndarray, conditions: ConditioningInputs, batch: int
) -> Iterator[np.ndarray]:
    for samples in generate_batches(subject.network, subject.spec, seeds, batch=batch, conditions=conditions):
        yield subject.decode(samples)


def image_agreement(expected: np.ndarray, found: np.ndarray, data_range: tuple[float, float]) -> dict[str, float]:
    """Return mean PSNR in dB and SSIM over images [N, C, H, W]."""
    span = data_range[1] - data_range[0]
    return {"psnr_db": psnr_db(expected, found, span), "ssim": ssim(expected, found, span)}


def _warn_if_unlike(mean: np.ndarray, real: tuple[np.ndarray, np.ndarray], reference: Reference) -> None:
    """Warn if the mean features of the samples are far from the reference's, measured in the spread of its images."""
    distance = float(np.sqrt(((mean - real[0]) ** 2).sum() / np.trace(real[1])))
    if distance > UNLIKE:
        logger.warning(
            f"the samples look nothing like the reference {reference.source['file']}: their mean features are "
            f"{distance:.2f} standard deviations of its images away. Name images like those that the model was "
            "trained on with --reference"
        )


def _spread(values: list[float]) -> dict[str, float | None]:
    """Return mean and standard deviation; one value has no standard deviation."""
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else None}
