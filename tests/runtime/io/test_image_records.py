"""runtime/io/image_records.py: a finished image is recognized by its record, and another one is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.image_records import KEYS, common_record, image_path, is_finished
from diffpress.runtime.io.images import write_image

RECORD = {**dict.fromkeys(KEYS, "x"), "seed": "42", "prompt": "a café\twith 漢 "}
PIXELS = np.zeros((4, 4, 3), np.uint8)


def test_an_image_is_named_by_its_seed(tmp_path: Path) -> None:
    assert image_path(tmp_path, RECORD) == tmp_path / "000042.png"
    assert image_path(tmp_path, {"seed": "12345678"}).name == "12345678.png"


def test_only_an_image_with_the_same_record_is_finished(tmp_path: Path) -> None:
    assert not is_finished(tmp_path, RECORD)
    write_image(PIXELS, image_path(tmp_path, RECORD), RECORD)
    assert is_finished(tmp_path, RECORD) and not is_finished(tmp_path, RECORD | {"seed": "43"})


@pytest.mark.parametrize("key", [key for key in KEYS if key != "seed"])
def test_any_other_setting_is_refused_by_name(key: str, tmp_path: Path) -> None:
    write_image(PIXELS, image_path(tmp_path, RECORD), RECORD)
    without = {name: value for name, value in RECORD.items() if name != key}
    for other, here in ((RECORD | {key: "new"}, "new"), (without, "none")):
        with pytest.raises(
            InvalidInputError, match=rf"000042.png: was made with other settings \({key}: .*{here} here"
        ):
            is_finished(tmp_path, other)


def test_an_image_of_something_else_is_refused(tmp_path: Path) -> None:
    write_image(PIXELS, tmp_path / "000042.png")
    with pytest.raises(InvalidInputError, match="made with other settings"):
        is_finished(tmp_path, RECORD)
    (tmp_path / "000042.png").write_text("not an image")
    with pytest.raises(InvalidInputError, match="exists and is no image of diffpress"):
        is_finished(tmp_path, RECORD)


def test_a_common_record_has_the_shared_entries_and_the_range_of_seeds() -> None:
    assert common_record([{"seed": "3", "prompt": "a"}]) == {"seed": "3", "prompt": "a"}
    assert common_record([{"seed": "3", "a": "1", "b": "2"}, {"seed": "4", "a": "1", "b": "3"}]) == {
        "seed": "3..4",
        "a": "1",
    }
