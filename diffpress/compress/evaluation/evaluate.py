"""Quality of the samples: distributional and paired metrics.

distributional   Frechet distance and KID of N samples to the reference, in a named feature network, for each of K
                 seeds; and the floor: the Frechet distance of N real images (at most half of them) to the others
paired           PSNR and SSIM between the images of this model and another from the same noise and labels

The feature network is used only for scoring: nothing is trained on it or selected by it.
"""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.features import FeatureNetwork, Reference
from diffpress.compress.evaluation.metrics import (
    frechet_distance,
    kernel_distance,
    moments,
    psnr_db,
    ssim,
)
from diffpress.compress.progress import progress
from diffpress.compress.seeds import EVALUATION_SEED
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.sampler import cycled_labels, generate, generate_batches
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec


def evaluate(
    network: Network,
    spec: DenoiserSpec,
    config: EvaluateConfig,
    features: FeatureNetwork,
    reference: Reference,
    plan: SamplingPlan | None = None,
    what: str = "evaluate",
) -> dict[str, Any]:
    """Sample `config.samples` images for each of `config.seeds` seeds and score them.

    Args:
        network: The network to sample from.
        spec: Its spec.
        config: Number of samples and seeds, batch size.
        features: Feature network.
        reference: Features of real images.
        plan: Sampling plan; None for the spec's.
        what: Label of the progress bar.

    Returns:
        The result in the layout of `evaluate --json`; `paired` is None.

    Raises:
        InvalidInputError: There are fewer reference images than samples.
    """
    labels = cycled_labels(spec, config.samples)
    if config.samples > len(reference.features):
        raise InvalidInputError(
            f"{config.samples} samples require at least as many reference images, "
            f"{reference.source['file']} has {len(reference.features)}"
        )
    real = moments(reference.features)
    distances, kids, accuracies = [], [], []
    with progress(what, config.seeds * config.samples) as advance:
        for seed in range(config.seeds):
            seeds = np.arange(config.samples) + (seed + 1) * EVALUATION_SEED
            found, predicted = [], []
            for images in generate_batches(network, spec, seeds, labels, plan, config.batch):
                embedded, logits = features.run(images)
                found.append(embedded)
                predicted.append(logits.argmax(1))
                advance(seed * config.samples + sum(map(len, found)))
            sampled = np.concatenate(found)
            distances.append(frechet_distance(*moments(sampled), *real))
            kids.append(kernel_distance(sampled, reference.features, reference.kernel_within))
            if labels is not None:
                accuracies.append(float((np.concatenate(predicted) == labels).mean()))
    return {
        "samples": config.samples,
        "seeds": config.seeds,
        "features": {"name": features.name, "sha256": features.sha256},
        "frechet": {**_spread(distances), "floor": real_floor(reference.features, config.samples, config.seeds)},
        "kid": _spread(kids),
        "paired": None,
        "label_accuracy": statistics.fmean(accuracies) if accuracies else None,
        "reference": reference.source,
    }


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
    network: Network, other: Network, spec: DenoiserSpec, config: EvaluateConfig, against: str
) -> dict[str, Any]:
    """Return PSNR and SSIM between the images of two networks from the same noise and labels under the spec's plan.

    Output corrections in the plan belong to `network` and are not applied to `other`.
    """
    seeds = np.arange(config.samples)
    ours = generate(network, spec, seeds, batch=config.batch)
    theirs = generate(other, spec, seeds, plan=spec.plan.without_corrections, batch=config.batch)
    span = spec.data_range[1] - spec.data_range[0]
    return {"against": against, "psnr_db": psnr_db(theirs, ours, span), "ssim": ssim(theirs, ours, span)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
