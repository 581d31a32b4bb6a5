"""export/comparison.py: the image of a run with the teacher above and the bundle below, under their prompts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.compress.workspace import Workspace
from diffpress.export.comparison import CAPTIONED_WIDTH, LATENT_COLUMNS, Pairs, sample_pairs, write_comparison
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.io.images import GRID_GAP
from diffpress.runtime.pipeline import Pipeline

WHITE = 1.0
PROMPTS = ("flat red apple on blue", "a", "W" * 40 + " WIDE " * 100)


@pytest.fixture
def pairs() -> Pairs:
    teacher, bundle = np.full((3, 3, 16, 16), WHITE, np.float32), np.full((3, 3, 16, 16), -WHITE, np.float32)
    return Pairs(teacher, bundle, teacher, 3, (-1.0, 1.0), prompts=PROMPTS)


def written(pairs: Pairs, folder: Path) -> np.ndarray:
    write_comparison(pairs, Workspace(folder))
    with Image.open(folder / "comparison.png") as image:
        return np.asarray(image)


def test_prompts_stand_above_their_own_pair(pairs: Pairs, tmp_path: Path) -> None:
    image = written(pairs, tmp_path)
    column = CAPTIONED_WIDTH + GRID_GAP
    assert image.shape[1] == 3 * column - GRID_GAP
    captions = image[: len(image) - 2 * column + GRID_GAP]
    parts = [captions[:, start : start + CAPTIONED_WIDTH] for start in range(0, 3 * column, column)]
    rows = [int((part.min(axis=(1, 2)) < 128).sum()) for part in parts]  # with ink
    assert 0 < rows[1] < rows[0] < rows[2]  # one short line, two lines, as many as there may be
    assert not captions[:, column - GRID_GAP : column].min() < 255  # no text reaches the next column
    bottom = image[-CAPTIONED_WIDTH:, :CAPTIONED_WIDTH]
    assert (bottom == 0).all() and (image[-column - CAPTIONED_WIDTH : -column, :CAPTIONED_WIDTH] == 255).all()


@pytest.mark.parametrize("channels", [1, 4])
def test_grey_and_transparent_pictures_have_captions_too(pairs: Pairs, channels: int, tmp_path: Path) -> None:
    images = np.full((3, channels, 16, 16), -WHITE, np.float32)
    image = written(Pairs(images, images, images, 3, (-1.0, 1.0), prompts=PROMPTS), tmp_path)
    assert image.shape[2] == 3 and (image[-1, 0] == 0).all()


def test_pairs_without_prompts_have_no_captions(pairs: Pairs, tmp_path: Path) -> None:
    plain = Pairs(pairs.teacher, pairs.bundle, pairs.teacher, 3, (-1.0, 1.0))
    assert written(plain, tmp_path).shape == (2 * 16 + GRID_GAP, 3 * (16 + GRID_GAP) - GRID_GAP, 3)


def test_the_prompts_of_a_file_are_sampled(sd_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\nred dog\n", encoding="utf-8")
    with Pipeline(load_bundle(sd_bundle)) as pipeline:
        spec = pipeline.spec
        named = sample_pairs(pipeline, pipeline, tmp_path / "prompts.txt")
        own = np.concatenate(
            list(pipeline.images(range(2), pipeline.conditions(2, spec, prompts=["a cat", "red dog"]), spec, batch=2))
        )
        assert len(set(sample_pairs(pipeline, pipeline).prompts)) == LATENT_COLUMNS
    assert named.prompts == ("a cat", "red dog") * (LATENT_COLUMNS // 2)
    np.testing.assert_array_equal(named.teacher[:2], own)
    np.testing.assert_array_equal(named.bundle[:2], own)
