"""examples/icons.py: compositions, captions, the split and the colour of backgrounds."""

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from tests.examples.made_icons import NAMES, save_icons


@pytest.fixture
def icons(examples: None) -> ModuleType:
    import icons

    return icons


@pytest.fixture
def few(icons: ModuleType, tmp_path: Path) -> Any:
    save_icons(tmp_path / "icons.npz")
    return icons.load_icons(tmp_path / "icons.npz")


def test_captions_and_images_of_a_combination_agree(icons: ModuleType, few: Any) -> None:
    combination = 8 * 9 + list(icons.COLOURS).index("pink")  # icon 9: name 3 in the second style
    assert few.captions()[combination] == "shaded yellow disc on pink"
    (image,) = few.images(np.array([combination]))
    assert tuple(image[:, 0, 0]) == icons.COLOURS["pink"]
    assert tuple(image[:, 32, 32]) == tuple(few.rgba[9, 32, 32, :3])


def test_half_transparent_pixels_are_mixed_with_the_background(icons: ModuleType) -> None:
    rgba = np.full((1, 8, 8, 4), 100, np.uint8)
    rgba[..., 3] = 51  # 0.2 of the drawing, 0.8 of the background
    mixed = icons.Icons(rgba, np.array(["fog"]), np.array(["flat"])).images(np.array([0]))
    assert (mixed == round(0.2 * 100 + 0.8 * 255)).all()


def test_held_out_combinations_have_different_names_and_are_not_trained_on(few: Any) -> None:
    held_out = few.held_out()
    assert len(held_out) == len(NAMES) // 4
    assert len(set(few.names[held_out // 8])) == len(held_out)
    assert sorted([*held_out, *few.training()]) == list(range(few.combinations))


def test_every_background_is_recognized(icons: ModuleType, few: Any) -> None:
    combinations = np.arange(few.combinations)
    images = few.images(combinations)
    noisy = np.clip(images + np.random.default_rng(0).normal(0, 10, images.shape), 0, 255).astype(np.uint8)
    for found in (icons.background_colours(images), icons.background_colours(noisy)):
        assert np.array_equal(found, combinations % len(icons.COLOURS))


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"rgba": np.zeros((2, 8, 8, 3), np.uint8)}, "rgba must be uint8"),
        ({"rgba": np.zeros((0, 8, 8, 4), np.uint8)}, "rgba must be uint8"),
        ({"style": np.array(["flat"])}, "2 captions and styles"),
        ({"caption": np.array([{}, {}], object)}, "not an npz file"),
    ],
)
def test_a_file_with_other_arrays_exits_with_a_one_line_error(
    icons: ModuleType, tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    usual = {"rgba": np.zeros((2, 8, 8, 4), np.uint8), "caption": np.array(["a", "b"]), "style": np.array(["c", "c"])}
    np.savez(tmp_path / "icons.npz", **(usual | arrays))  # type: ignore[arg-type]  # numpy: allow_pickle=
    with pytest.raises(SystemExit, match=message):
        icons.load_icons(tmp_path / "icons.npz")
