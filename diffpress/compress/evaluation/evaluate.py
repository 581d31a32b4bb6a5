"""How good are the samples: two kinds of figures, never one alone.

distributional   Frechet distance and KID of N samples to the reference, in a named feature network, for each of K
                 seeds, and the floor: the same distance for N real images against the others, for half of
                 them where N is more
paired           the same noise and labels through this model and another: PSNR and SSIM of the images

The feature network only ever scores; nothing is trained on it or selected by it.
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
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import Network
from diffpress.runtime.sampler import generate, generate_batches, labels_in_turn
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

SEED_STRIDE = 10_000_000  # sample i of seed s starts from the noise of seed s * stride + i


def evaluate(
    network: Network,
    spec: DenoiserSpec,
    config: EvaluateConfig,
    features: FeatureNetwork,
    reference: Reference,
    plan: SamplingPlan | None = None,
    what: str = "evaluate",
) -> dict[str, Any]:
    """Sample `config.samples` images for each of `config.seeds` seeds and score them, as `evaluate --json` shows it."""
    labels = labels_in_turn(spec, config.samples)
    if config.samples > len(reference.features):
        raise InvalidInputError(
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
    theirs = generate(other, spec, seeds, plan=spec.plan.without_corrections, batch=config.batch)
    span = spec.data_range[1] - spec.data_range[0]
    return {"against": against, "psnr_db": psnr_db(theirs, ours, span), "ssim": ssim(theirs, ours, span)}


def _spread(values: list[float]) -> dict[str, float]:
    return {"mean": statistics.fmean(values), "sd": statistics.stdev(values) if len(values) > 1 else 0.0}
