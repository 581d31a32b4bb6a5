"""Prompt adherence: how well images follow their prompts, in the shared space of an image and a text encoder (CLIP).

CLIP score   100 max(cos(image, prompt), 0), mean over images (Hessel et al. 2021, arXiv:2104.08718)
retrieval    fraction of images whose own text has the highest cosine of all candidates (R-precision, Park et al. 2021)
             Candidates are the distinct prompts, or texts that the user names, such as names of objects: an image's own
             text is then the longest candidate that occurs in its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffpress.compress.evaluation.features import FeatureNetwork
from diffpress.compress.training.teacher_data import read_prompts
from diffpress.runtime.errors import InvalidInputError

BATCH = 256


@dataclass(frozen=True)
class PromptAdherence:
    """The texts that images are compared with.

    Attributes:
        prompts: Normalized embeddings of the images' prompts [N, D].
        candidates: Normalized embeddings of all candidates [M, D].
        own: Index of each image's own candidate [N].
    """

    prompts: np.ndarray
    candidates: np.ndarray
    own: np.ndarray

    def clip_score(self, images: np.ndarray) -> float:
        """Return the CLIP score of the features [N, D] of images."""
        cosines = (_normalized(images) * self.prompts).sum(axis=1)
        return float(100.0 * cosines.clip(0.0).mean())

    def retrieval(self, images: np.ndarray) -> float:
        """Return the fraction of images [N, D] that are nearest to their own candidate."""
        return float(((_normalized(images) @ self.candidates.T).argmax(axis=1) == self.own).mean())


def prompt_adherence(
    prompts: Sequence[str], features: FeatureNetwork, candidates: Path | None = None
) -> PromptAdherence | None:
    """Embed prompts and candidates; return None if the model has no prompts or the network no text encoder.

    Args:
        prompts: Prompt of each image.
        features: Feature network.
        candidates: File of candidate texts, one per line; None for the distinct prompts.

    Raises:
        InvalidInputError: Candidates are named but cannot be used, or a prompt contains none of them.
    """
    if not prompts or features.embed_text is None:
        if candidates is not None:
            reason = f"{features.name} has no text encoder" if prompts else "the model is not conditioned on text"
            raise InvalidInputError(f"{candidates}: candidates are compared with images through prompts, but {reason}")
        return None
    distinct = list(dict.fromkeys(prompts))
    texts = distinct if candidates is None else list(dict.fromkeys(read_prompts(candidates)))
    own = {prompt: number for number, prompt in enumerate(distinct)}
    if candidates is not None:
        own = {prompt: _own_candidate(prompt, texts, candidates) for prompt in distinct}
    rows = _embedded(distinct, features)
    return PromptAdherence(
        rows[[distinct.index(prompt) for prompt in prompts]],
        rows if candidates is None else _embedded(texts, features),
        np.array([own[prompt] for prompt in prompts]),
    )


def _own_candidate(prompt: str, texts: Sequence[str], file: Path) -> int:
    """Return the index of the longest text that occurs in the prompt as whole words."""
    folded = _folded(prompt)
    patterns = (rf"(?<!\w){re.escape(_folded(text))}(?!\w)" for text in texts)
    found = [number for number, pattern in enumerate(patterns) if re.search(pattern, folded)]
    if not found:
        raise InvalidInputError(f"{file}: no line occurs in the prompt '{prompt}'; add what its image has to show")
    return max(found, key=lambda number: len(texts[number]))


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _embedded(texts: Sequence[str], features: FeatureNetwork) -> np.ndarray:
    assert features.embed_text is not None
    parts = [features.embed_text(texts[start : start + BATCH]) for start in range(0, len(texts), BATCH)]
    return _normalized(np.concatenate(parts))


def _normalized(rows: np.ndarray) -> np.ndarray:
    rows = rows.astype(np.float64)
    result: np.ndarray = rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(1e-12)
    return result
