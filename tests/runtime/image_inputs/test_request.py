"""runtime/image_inputs/request.py: what a user may give to start from, and one line for everything else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.image_inputs.request import ImageRequest, read_image_request

RED = np.full((4, 6, 3), (255, 0, 0), np.uint8)
HALF = np.array([[0, 0, 0, 255, 255, 255]] * 4, np.uint8)


def read(image: Any, mask: Any = None, strength: float | None = None, overlay: bool = False) -> ImageRequest:
    found = read_image_request(image, mask, strength, overlay)
    assert found is not None
    return found


def test_a_file_a_picture_and_an_array_are_the_same_image(tmp_path: Path) -> None:
    Image.fromarray(RED).save(tmp_path / "red.png")
    for image in (RED, Image.fromarray(RED), tmp_path / "red.png", str(tmp_path / "red.png"), RED[None], [RED]):
        found = read(image)
        assert np.array_equal(found.pixels, RED[None]) and found.size == (4, 6)


def test_a_list_has_one_image_for_each_sample() -> None:
    assert read([RED, RED[::-1]]).pixels.shape == read(np.stack([RED, RED])).pixels.shape == (2, 4, 6, 3)


def test_a_photo_is_turned_upright(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned by a quarter
    Image.fromarray(RED).save(tmp_path / "photo.png", exif=exif)
    assert read(tmp_path / "photo.png").size == (6, 4)


def test_white_is_repainted_in_a_mask_of_any_mode() -> None:
    expected = HALF[None] >= 128
    picture = Image.fromarray(HALF)
    given: tuple[Any, ...] = (HALF, HALF > 0, picture, picture.convert("1"), picture.convert("RGB"), [HALF])
    for mask in given:
        found = read(RED, mask).masks
        assert found is not None and np.array_equal(found, expected)
    grey = read(RED[:1, :2], np.array([[127, 128]], np.uint8)).masks
    assert grey is not None and grey.tolist() == [[[False, True]]]


def test_the_default_strength_depends_on_the_mask() -> None:
    assert (read(RED).strength, read(RED, HALF).strength, read(RED, HALF, 0.3).strength) == (0.8, 1.0, 0.3)


def test_nothing_given_is_no_request() -> None:
    assert read_image_request(None) is None


def test_another_image_mask_strength_or_overlay_has_other_facts() -> None:
    requests = [read(RED), read(RED // 2), read(RED, HALF), read(RED, HALF, 0.5), read(RED, HALF, 0.5, True)]
    assert len({tuple(request.facts().items()) for request in requests}) == 5


REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "mask alone": ({"mask": HALF}, ("--mask", "--image")),
    "strength alone": ({"strength": 0.5}, ("--strength", "--image")),
    "overlay alone": ({"overlay": True}, ("--overlay", "--image")),
    "overlay without a mask": ({"image": RED, "overlay": True}, ("--overlay", "--mask")),
    "strength 0": ({"image": RED, "strength": 0.0}, ("--strength 0", "above 0")),
    "strength above 1": ({"image": RED, "strength": 1.5}, ("--strength 1.5", "not above 1")),
    "strength in words": ({"image": RED, "strength": "half"}, ("--strength half", "number")),
    "strength NaN": ({"image": RED, "strength": float("nan")}, ("--strength nan",)),
    "missing file": ({"image": "nowhere.png"}, ("--image nowhere.png", "cannot be read")),
    "no image file": ({"image": __file__}, (__file__, "cannot be read")),
    "float array": ({"image": RED / 255}, ("--image", "float64", "uint8")),
    "another object": ({"image": 3}, ("--image", "int")),
    "no images": ({"image": []}, ("--image", "none")),
    "images of two sizes": ({"image": [RED, RED[:2]]}, ("--image", "4x6x3", "2x6x3")),
    "palette": ({"image": Image.fromarray(RED).convert("P")}, ("--image", "'P'", "RGB")),
    "mask of another size": ({"image": RED, "mask": HALF[:2]}, ("--mask", "2x6", "4x6")),
    "transparent mask": ({"image": RED, "mask": Image.new("RGBA", (6, 4))}, ("--mask", "'RGBA'", "L")),
    "mask with channels": ({"image": RED, "mask": RED}, ("--mask", "[4, 6, 3]", "[H, W]")),
}


@pytest.mark.parametrize("name", REFUSED)
def test_everything_else_is_refused_in_one_line(name: str) -> None:
    given, words = REFUSED[name]
    with pytest.raises(InvalidInputError) as caught:
        read_image_request(**{"image": None, **given}, prefix="--")
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
