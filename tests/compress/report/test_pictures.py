"""compress/report/pictures.py: pairs of pictures and their difference, read without unpickling."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.compress.report.pictures import EXACT_SIDE, GAIN, MAX_SIDE, SHOWN, pairs_of
from diffpress.compress.workspace import Workspace
from diffpress.export.comparison import Pairs, write_comparison
from diffpress.runtime.errors import InvalidInputError


def decoded(uri: str) -> np.ndarray:
    head, _, data = uri.partition(",")
    assert head in ("data:image/png;base64", "data:image/jpeg;base64")
    with Image.open(io.BytesIO(base64.b64decode(data))) as image:
        return np.asarray(image)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_pictures_of_a_run_come_back_with_their_difference(channels: int, tmp_path: Path) -> None:
    teacher, bundle = (np.full((2, channels, 4, 6), value, np.float32) for value in (1.0, 0.6))
    write_comparison(Pairs(teacher, bundle, teacher, 2, (-1.0, 1.0), prompts=("a", "b")), Workspace(tmp_path))
    first, second = pairs_of(Workspace(tmp_path))
    assert (first.prompt, second.prompt, second.number) == ("a", "b", 1)
    found = [decoded(uri) for uri in (first.teacher, first.bundle, first.difference)]
    assert [int(image.max()) for image in found] == [255, 204, GAIN * 51]
    assert found[0].shape[:2] == (4, 6) and (found[2] == GAIN * 51).all()
    assert first.psnr_db == pytest.approx(-20 * np.log10(51 / 255))


def test_equal_pictures_have_an_infinite_psnr_and_no_prompt(tmp_path: Path) -> None:
    run, pixels = Workspace(tmp_path), np.zeros((SHOWN + 3, 4, 4, 1), np.uint8)
    np.savez(run.pairs, teacher=pixels, bundle=pixels, prompts=np.array([], dtype=str))
    pairs = pairs_of(run)
    assert len(pairs) == SHOWN and pairs[0].psnr_db == float("inf") and pairs[0].prompt == ""


def test_large_pictures_are_reduced(tmp_path: Path) -> None:
    run, pixels = Workspace(tmp_path), np.zeros((1, 2 * MAX_SIDE, MAX_SIDE, 3), np.uint8)
    np.savez(run.pairs, teacher=pixels, bundle=pixels)
    assert decoded(pairs_of(run)[0].teacher).shape == (MAX_SIDE, MAX_SIDE // 2, 3)
    small = np.zeros((1, EXACT_SIDE, EXACT_SIDE, 3), np.uint8)
    np.savez(run.pairs, teacher=small, bundle=small)
    assert pairs_of(run)[0].teacher.startswith("data:image/png")


@pytest.mark.parametrize("broken", ["pickle", "shape", "dtype", "missing", "bytes"])
def test_pictures_that_cannot_be_read_are_named(broken: str, tmp_path: Path) -> None:
    run, pixels = Workspace(tmp_path), np.zeros((2, 4, 4, 1), np.uint8)
    if broken == "bytes":
        run.pairs.write_bytes(b"no archive")
    else:
        other: np.ndarray | None = {
            "pickle": np.array([{}, {}], dtype=object),
            "shape": pixels[:1],
            "dtype": pixels.astype(np.float32),
            "missing": None,
        }[broken]
        arrays: dict[str, Any] = {"teacher": pixels, "bundle": other}
        np.savez(run.pairs, **{name: array for name, array in arrays.items() if array is not None})
    with pytest.raises(InvalidInputError, match=r"pairs\.npz"):
        pairs_of(run)
