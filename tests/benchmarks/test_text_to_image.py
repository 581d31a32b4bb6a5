"""benchmarks/text_to_image.py: the scores of real images, of wrong ones, and of real images with other names."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import text_to_image

from diffpress.compress.evaluation.features import FeatureNetwork, Reference
from tests.examples.made_icons import save_icons

ROOT = Path(__file__).parents[2]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Prompts and names of made icons, of which every image is one plain colour inside its frame."""
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    import icons

    save_icons(tmp_path / "icons.npz")
    loaded = icons.load_icons(tmp_path / "icons.npz")
    captions = loaded.captions()
    held_out = [captions[one] for one in range(0, len(captions), 9)]
    for name, lines in (("prompts", held_out), ("captions", captions[::5]), ("names", sorted(set(loaded.names)))):
        (tmp_path / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return tmp_path


@pytest.fixture
def features(data: Path) -> FeatureNetwork:
    """Features that give an image and the text of its own icon the same direction."""
    draw = text_to_image.real(data / "icons.npz")

    def inner_colour(pixels: np.ndarray) -> np.ndarray:
        found: np.ndarray = pixels[:, 24:40, 24:40].astype(np.float64).mean(axis=(1, 2)) - 127.5
        return found

    def embed_text(texts: Sequence[str]) -> np.ndarray:
        prompts = [text if " on " in text else f"flat {text} on red" for text in texts]
        return inner_colour(draw(prompts, 0).transpose(0, 2, 3, 1))

    def run(images: np.ndarray) -> tuple[np.ndarray, None]:
        return inner_colour(images.transpose(0, 2, 3, 1)), None

    return FeatureNetwork("made", "0", run, embed_text, inner_colour)


@pytest.fixture
def score(data: Path, features: FeatureNetwork) -> Callable[..., dict[str, float]]:
    draw = text_to_image.real(data / "icons.npz")
    assert features.embed_pixels is not None
    prompts = (data / "captions.txt").read_text(encoding="utf-8").splitlines()
    embedded = features.embed_pixels(draw(prompts, 0).transpose(0, 2, 3, 1))

    def scored(change: Callable[[np.ndarray], np.ndarray]) -> dict[str, float]:
        drawn: dict[str, float] = text_to_image.scores(
            lambda texts, seed: change(draw(texts, seed)), data, features, Reference(embedded, {}), 0
        )[0]
        return drawn

    return scored


def test_real_images_are_perfect_and_others_are_not(score: Callable[..., dict[str, float]]) -> None:
    real = score(lambda images: images)
    assert real["colour"] == 1.0 and real["frechet"] < 1e-6
    shuffled = score(lambda images: np.roll(images, 5, axis=0))
    assert shuffled["colour"] < 0.7 and shuffled["retrieval"] < real["retrieval"]
    assert shuffled["clip_score"] < real["clip_score"]
    dark = score(lambda images: images // 4)
    assert dark["frechet"] > 100 and dark["kid"] > real["kid"]


def test_a_model_or_real_images_are_scored_not_both(monkeypatch: pytest.MonkeyPatch) -> None:
    for words in ([], ["bundle", "--real", "icons.npz"]):
        monkeypatch.setattr(sys, "argv", ["text_to_image.py", *words])
        with pytest.raises(SystemExit):
            text_to_image.main()
