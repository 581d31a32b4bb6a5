"""runtime/io/images.py: pixel conversion, image grids and atomic writes."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.images import image_grid, to_uint8, write_image


def test_the_data_range_maps_to_0_to_255_and_other_values_are_clipped() -> None:
    values = np.array([-5.0, -1.0, 0.0, 1.0, 5.0, np.nan], np.float32).reshape(1, 1, 1, 6)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 0]
    assert to_uint8(np.array([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3), (0.0, 1.0)).ravel().tolist() == [
        0,
        128,
        255,
    ]


def test_values_are_rounded_to_the_nearest_level() -> None:
    levels = np.arange(256)
    nearly = (levels + 0.4) / 255 * 2 - 1
    assert to_uint8(nearly.reshape(1, 1, 1, -1)).ravel().tolist() == levels.tolist()


def test_channels_become_the_last_axis() -> None:
    images = np.zeros((2, 3, 4, 5), np.float32)
    images[1, 2] = 1.0
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3) and (pixels[1, :, :, 2] == 255).all() and (pixels[1, :, :, 0] == 128).all()


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(5, None, (8, 13)), (1, None, (3, 3)), (4, 4, (3, 18)), (3, 9, (3, 13))]
)
def test_an_image_grid_holds_every_image_in_reading_order(
    count: int, columns: int | None, size: tuple[int, int]
) -> None:
    pixels = np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 3, 1), np.uint8)
    canvas = image_grid(pixels, columns, gap=2)
    assert canvas.shape == (*size, 1)
    corners = canvas[::5, ::5, 0].ravel()
    assert corners[:count].tolist() == list(range(1, count + 1)) and (corners[count:] == 255).all()


def test_an_image_grid_needs_at_least_one_column() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        image_grid(np.zeros((2, 3, 3, 1), np.uint8), columns=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_reads_back_unchanged(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    write_image(pixels, tmp_path / "deep" / "grid.png")
    with Image.open(tmp_path / "deep" / "grid.png") as image:
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels) and image.format == "PNG"


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from PIL import Image

    path = tmp_path / "grid.png"
    path.write_bytes(b"the old one")

    def write_half(self: object, file: Path, **options: object) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", write_half)
    with pytest.raises(InvalidInputError, match="no space left"):
        write_image(np.zeros((2, 2, 1), np.uint8), path)
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


def test_a_reader_of_the_old_file_is_not_disturbed(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"the old one")
    with path.open("rb") as reader:
        write_image(np.zeros((2, 2, 1), np.uint8), path)
        assert reader.read() == b"the old one"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_written_file_has_the_default_permissions(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_image(np.zeros((2, 2, 1), np.uint8), tmp_path / "grid.png")
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "grid.png")]
    assert mode[0] == mode[1]


def test_an_unwritable_path_raises(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="choose another path"):
        write_image(np.zeros((2, 2, 1), np.uint8), tmp_path / "file" / "grid.png")
    with pytest.raises(InvalidInputError, match="choose another path"):
        write_image(np.zeros((2, 2, 1), np.uint8), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
