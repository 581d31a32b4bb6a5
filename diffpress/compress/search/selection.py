"""The features that select: a second network, other noise and other prompts than those that report.

A search that chose recipes by the network that scores them would find what that network overlooks. The built-in second
network fits 28 x 28 grey images; for others `--select-features` names one. Without any, trials are compared by the
error of their samples alone (search/proxies.py).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpress.compress.builtin import FEATURES, SELECTION_FEATURES, SELECTION_REFERENCE
from diffpress.compress.config import EvaluateConfig
from diffpress.compress.evaluation.evaluate import real_floor, sampled_features
from diffpress.compress.evaluation.features import FeatureNetwork, image_shape, load_features, load_reference
from diffpress.compress.evaluation.metrics import frechet_distance, moments
from diffpress.compress.evaluation.subject import EvaluationSubject
from diffpress.compress.search.settings import SearchSettings
from diffpress.compress.seeds import SELECTION_DRAW
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.runtime.bundle import sha256
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

BUILTIN_SHAPE = (1, 28, 28)
FLOOR_DRAWS = 3


@dataclass(frozen=True)
class Selection:
    """Scores a subject's samples in the features that select.

    Attributes:
        features: The network.
        config: Number of samples and batch.
        real: Mean and covariance of the reference's features.
        floor: Frechet distance of as many real images to the others.
        teacher: Frechet distance of the teacher's samples, at least the floor.
    """

    features: FeatureNetwork
    config: EvaluateConfig
    real: tuple[np.ndarray, np.ndarray]
    floor: float
    teacher: float

    def ratio(self, subject: EvaluationSubject) -> float:
        """Return the Frechet distance of the subject's samples as a ratio to the teacher's."""
        return max(_distance(subject, self.features, self.config, self.real), self.floor) / self.teacher


def check_features(settings: SearchSettings, spec: DenoiserSpec) -> None:
    """Check that the networks fit the model's images, and that not the same one selects and reports.

    Raises:
        InvalidInputError: Otherwise, or if a bound on the Frechet distance has no features that report.
    """
    reports = settings.features or (FEATURES if spec.is_pixel_space else None)
    selects = settings.select_features
    if settings.features is None and not fits_builtin(spec):
        if settings.bounds.max_frechet_ratio is not None:
            raise InvalidInputError(
                "--max-frechet-ratio: no built-in features fit the model's images; name an ONNX image encoder with "
                "--features"
            )
        if settings.reference is not None:
            raise InvalidInputError(f"--reference {settings.reference}: belongs to --features; name the network")
        reports = None
    if selects is None and settings.select_reference is not None:
        raise InvalidInputError(
            f"--select-reference {settings.select_reference}: belongs to --select-features; name the network"
        )
    for network in (reports, selects):
        if network is not None:
            load_features(network, spec)
    if reports is not None and selects is not None and sha256(reports) == sha256(selects):
        raise InvalidInputError(
            f"--select-features {selects}: is the network that reports; a search that selects by it would flatter its "
            "result. Name another one"
        )


def split_prompts(settings: SearchSettings, spec: DenoiserSpec) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the prompts that select and those that report: every second one each; none without text encoders."""
    if spec.conditioning.kind != "text" or not spec.conditioning.encoders:
        if settings.prompts is not None:
            raise InvalidInputError(f"--prompts {settings.prompts}: the model encodes no prompts; leave them out")
        return (), ()
    texts = read_prompts(settings.prompts)
    if len(texts) < 2:
        raise InvalidInputError(f"--prompts {settings.prompts}: give at least two, one to select by and one to report")
    return texts[1::2], texts[::2]


def selecting_network(settings: SearchSettings, spec: DenoiserSpec) -> tuple[Path, Path | None] | None:
    """Return the network that selects and its real images, if there are any; None without a network that fits."""
    if settings.select_features is not None:
        return settings.select_features, settings.select_reference
    return (SELECTION_FEATURES, SELECTION_REFERENCE) if fits_builtin(spec) else None


def open_selection(
    settings: SearchSettings, spec: DenoiserSpec, teacher: EvaluationSubject, batch: int = 64
) -> Selection | None:
    """Return the selection, with the teacher's own distance measured; None without a network that fits."""
    found_network = selecting_network(settings, spec)
    if found_network is None:
        logger.warning(
            "no second feature network: trials are selected by the error of their samples against the teacher's; name "
            "one with --select-features"
        )
        return None
    network, images = found_network
    features = load_features(network, spec, settings.threads)
    config = EvaluateConfig(samples=settings.samples, seeds=1, batch=batch)
    if images is None:
        ((found, _),) = sampled_features(teacher, config, features, "sampling the teacher", [SELECTION_DRAW + 1])
    else:
        found = load_reference(images, features, spec).features
    real, floor = moments(found), real_floor(found, settings.samples, FLOOR_DRAWS)
    distance = max(_distance(teacher, features, config, real), floor)
    return Selection(features, config, real, floor, distance)


def fits_builtin(spec: DenoiserSpec) -> bool:
    """Return whether the built-in feature networks fit the model's images."""
    return spec.is_pixel_space and image_shape(spec) == BUILTIN_SHAPE


def _distance(
    subject: EvaluationSubject,
    features: FeatureNetwork,
    config: EvaluateConfig,
    real: tuple[np.ndarray, np.ndarray],
    draws: Sequence[int] = (SELECTION_DRAW,),
) -> float:
    ((found, _),) = sampled_features(subject, config, features, "sampling", draws)
    return frechet_distance(*moments(found), *real)
