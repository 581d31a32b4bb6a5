"""compress/evaluation/prompt_adherence.py: CLIP score and retrieval of made embeddings, against their definition."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.compress.evaluation.features import FeatureNetwork
from diffpress.compress.evaluation.prompt_adherence import prompt_adherence
from diffpress.runtime.errors import InvalidInputError

WORDS = ("apple", "red", "pie", "dog")


def embed_text(prompts: Sequence[str]) -> np.ndarray:
    """Return one axis for each of WORDS that occurs, and a constant one."""
    return np.array([[*(float(word in prompt.lower()) for word in WORDS), 0.1] for prompt in prompts])


def no_images(images: np.ndarray) -> Any:
    raise AssertionError("no images are embedded")


TEXTS = FeatureNetwork("clip", "f" * 64, no_images, embed_text)
IMAGES_ALONE = FeatureNetwork("resnet", "f" * 64, no_images)


def names(tmp_path: Path, *lines: str) -> Path:
    file = tmp_path / "names.txt"
    file.write_text("\n".join(lines), encoding="utf-8")
    return file


def test_prompts_are_retrieved_among_each_other_by_default() -> None:
    found = prompt_adherence(["a dog", "an apple", "a dog"], TEXTS)
    assert found is not None and len(found.candidates) == 2
    own = embed_text(["a dog", "an apple", "a dog"])
    assert found.retrieval(own) == 1.0 and found.clip_score(own) == pytest.approx(100.0)
    assert found.retrieval(own[::-1].copy()) == 1.0
    assert found.retrieval(own[[1, 0, 2]]) == pytest.approx(1 / 3)
    assert found.retrieval(7.0 * own) == 1.0, "only directions count"


def test_the_clip_score_is_the_mean_of_the_clipped_cosines() -> None:
    found = prompt_adherence(["a dog", "an apple"], TEXTS)
    assert found is not None
    images = np.random.default_rng(0).standard_normal((2, 5))
    texts = embed_text(["a dog", "an apple"])
    cosines = (images * texts).sum(1) / np.linalg.norm(images, axis=1) / np.linalg.norm(texts, axis=1)
    assert found.clip_score(images) == pytest.approx(100 * cosines.clip(0).mean())


def test_the_own_candidate_is_the_longest_that_occurs_in_the_prompt_as_whole_words(tmp_path: Path) -> None:
    file = names(tmp_path, "apple", "Red Apple", "red apple pie", "dog")
    prompts = ["flat red  apple, on blue", "an apple.", "red apple pie", "hot (dog) stand"]
    found = prompt_adherence(prompts, TEXTS, file)
    assert found is not None and found.own.tolist() == [1, 0, 2, 3]
    assert len(found.candidates) == 4
    assert found.retrieval(embed_text(["red apple", "apple", "red apple pie", "dog"])) == 1.0


@pytest.mark.parametrize(
    ("prompts", "features", "message"),
    [
        (["a pineapple"], TEXTS, "no line occurs in the prompt 'a pineapple'"),
        (["an apple"], IMAGES_ALONE, "resnet has no text encoder"),
        ([], TEXTS, "not conditioned on text"),
    ],
)
def test_candidates_that_cannot_be_used_are_refused(
    prompts: list[str], features: FeatureNetwork, message: str, tmp_path: Path
) -> None:
    with pytest.raises(InvalidInputError, match=message) as error:
        prompt_adherence(prompts, features, names(tmp_path, "apple", "dog"))
    assert "names.txt" in str(error.value) and "\n" not in str(error.value)


def test_without_prompts_or_a_text_encoder_there_is_no_adherence() -> None:
    assert prompt_adherence([], TEXTS) is None and prompt_adherence(["a dog"], IMAGES_ALONE) is None
