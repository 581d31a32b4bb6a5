"""runtime/io/images.py: pixels, grids and files that are written whole or not at all."""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.images import grid, to_uint8, write_png


def test_the_data_range_becomes_0_to_255_and_the_rest_is_clipped() -> None:
    values = np.array([-5.0, -1.0, 0.0, 1.0, 5.0, np.nan], np.float32).reshape(1, 1, 1, 6)
    assert to_uint8(values).ravel().tolist() == [0, 0, 128, 255, 255, 0]
    assert to_uint8(np.array([0.0, 0.5, 1.0]).reshape(1, 1, 1, 3), (0.0, 1.0)).ravel().tolist() == [
        0,
        128,
        255,
    ]


def test_rounding_goes_to_the_nearest_level() -> None:
    levels = np.arange(256)
    nearly = (levels + 0.4) / 255 * 2 - 1
    assert to_uint8(nearly.reshape(1, 1, 1, -1)).ravel().tolist() == levels.tolist()


def test_channels_move_last() -> None:
    images = np.zeros((2, 3, 4, 5), np.float32)
    images[1, 2] = 1.0
    pixels = to_uint8(images)
    assert pixels.shape == (2, 4, 5, 3) and (pixels[1, :, :, 2] == 255).all() and (pixels[1, :, :, 0] == 128).all()


@pytest.mark.parametrize(
    ("count", "columns", "size"), [(5, None, (8, 13)), (1, None, (3, 3)), (4, 4, (3, 18)), (3, 9, (3, 13))]
)
def test_a_grid_holds_every_image_in_reading_order(count: int, columns: int | None, size: tuple[int, int]) -> None:
    pixels = np.arange(1, count + 1, dtype=np.uint8)[:, None, None, None] * np.ones((1, 3, 3, 1), np.uint8)
    whole = grid(pixels, columns, gap=2)
    assert whole.shape == (*size, 1)
    corners = whole[::5, ::5, 0].ravel()
    assert corners[:count].tolist() == list(range(1, count + 1)) and (corners[count:] == 255).all()


def test_a_grid_needs_columns() -> None:
    with pytest.raises(InvalidInputError, match="at least 1"):
        grid(np.zeros((2, 3, 3, 1), np.uint8), columns=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_png_reads_back_as_it_was_written(tmp_path: Path, channels: int) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (6, 7, channels), dtype=np.uint8)
    write_png(pixels, tmp_path / "deep" / "grid.png")
    with Image.open(tmp_path / "deep" / "grid.png") as image:
        assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels) and image.format == "PNG"


def test_a_failed_write_leaves_the_old_file_and_no_scraps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from PIL import Image

    path = tmp_path / "grid.png"
    path.write_bytes(b"the old one")

    def half(self, file, **options) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(Image.Image, "save", half)
    with pytest.raises(InvalidInputError, match="no space left"):
        write_png(np.zeros((2, 2, 1), np.uint8), path)
    assert path.read_bytes() == b"the old one" and list(tmp_path.iterdir()) == [path]


def test_who_reads_the_old_file_meanwhile_keeps_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "grid.png"
    path.write_bytes(b"the old one")
    with path.open("rb") as reader:
        write_png(np.zeros((2, 2, 1), np.uint8), path)
        assert reader.read() == b"the old one"
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_written_file_is_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_text("")
    write_png(np.zeros((2, 2, 1), np.uint8), tmp_path / "grid.png")
    mode = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("other", "grid.png")]
    assert mode[0] == mode[1]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="choose another place"):
        write_png(np.zeros((2, 2, 1), np.uint8), tmp_path / "file" / "grid.png")
    with pytest.raises(InvalidInputError, match="choose another place"):
        write_png(np.zeros((2, 2, 1), np.uint8), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
