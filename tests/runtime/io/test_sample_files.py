"""runtime/io/sample_files.py: each kind of output holds what was written to it, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.image_records import Record
from diffpress.runtime.io.images import image_grid, to_uint8
from diffpress.runtime.io.sample_files import check_output, check_pictures, check_writable, open_output

RANGE = (-1.0, 1.0)


def records(count: int, first: int = 40) -> Iterator[Record]:
    return ({"prompt": "a café 漢", "seed": str(first + i), "steps": "8"} for i in range(count))


def written(out: str, samples: np.ndarray, batch: int = 2) -> None:
    with open_output(out, len(samples), records(len(samples)), RANGE) as write:
        for start in range(0, len(samples), batch):
            write(samples[start : start + batch])


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_a_folder_has_one_png_for_each_sample_named_by_its_seed(channels: int, tmp_path: Path) -> None:
    samples = noise(5, channels, 6, 7)
    written(f"{tmp_path}/new/", samples)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [f"0000{i}.png" for i in range(40, 45)]
    for pixels, record in zip(to_uint8(samples), records(5), strict=True):
        with Image.open(tmp_path / "new" / f"0000{record['seed']}.png") as image:
            assert np.array_equal(np.asarray(image).reshape(pixels.shape), pixels) and image.info == record


def test_the_images_of_a_folder_are_there_while_the_next_batch_is_made(tmp_path: Path) -> None:
    samples = noise(4, 1, 3, 3)
    with open_output(f"{tmp_path}/", 4, records(4), RANGE) as write:
        write(samples[:3])
        assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("suffix", [".png", ".PNG", ""])
def test_a_png_is_one_image_grid_with_what_its_images_have_in_common(suffix: str, tmp_path: Path) -> None:
    samples = noise(5, 3, 6, 7)
    written(str(tmp_path / f"grid{suffix}"), samples)
    with Image.open(tmp_path / f"grid{suffix}") as image:
        assert image.format == "PNG" and np.array_equal(np.asarray(image), image_grid(to_uint8(samples)))
        assert image.info == {"prompt": "a café 漢", "seed": "40..44", "steps": "8"}


@pytest.mark.parametrize(("suffix", "kind"), [(".jpg", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")])
@pytest.mark.parametrize("channels", [1, 3])
def test_other_formats_hold_nearly_the_same_pixels(suffix: str, kind: str, channels: int, tmp_path: Path) -> None:
    samples = np.tile(np.linspace(-1, 1, 32, dtype=np.float32), (4, channels, 32, 1))
    written(str(tmp_path / f"grid{suffix}"), samples)
    with Image.open(tmp_path / f"grid{suffix}") as image:
        found = np.asarray(image.convert("RGB" if channels == 3 else "L"), int)
        assert image.format == kind
    expected = image_grid(to_uint8(samples)).astype(int).reshape(found.shape)
    assert np.abs(found - expected).mean() < 3


@pytest.mark.parametrize("shape", [(5, 2), (5, 3, 4), (5, 2, 3, 3), (5, 5, 3, 3), (5, 3, 2, 4, 4)])
@pytest.mark.parametrize("suffix", [".npy", ".npz"])
def test_an_array_file_holds_the_samples_of_any_shape_as_float32(
    shape: tuple[int, ...], suffix: str, tmp_path: Path
) -> None:
    samples = noise(*shape)
    written(str(tmp_path / f"x{suffix}"), samples)
    found = np.load(tmp_path / f"x{suffix}", allow_pickle=False)
    array = found["samples"] if suffix == ".npz" else found
    assert array.dtype == np.float32 and np.array_equal(array, samples)


@pytest.mark.parametrize("name", ["x.npy", "x.npz", "x.png"])
def test_an_interrupted_file_is_not_left_behind(name: str, tmp_path: Path) -> None:
    def interrupted() -> None:
        with open_output(str(tmp_path / name), 4, records(4), RANGE) as write:
            write(noise(2, 1, 3, 3))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []


# --- refused before any work -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tiff", "x.gif", "x.v2", "x.npy.gz"])
def test_an_unknown_kind_of_file_is_refused(name: str) -> None:
    with pytest.raises(InvalidInputError, match=rf"--out {name}: unknown kind of file; use \.png, .*or a folder"):
        check_output(name)


def test_a_file_where_a_folder_is_wanted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(InvalidInputError, match="is a file, not a folder"):
        check_output(f"{tmp_path}/file/")
    with pytest.raises(InvalidInputError, match=r"cannot be written \((File exists|Not a directory)\)"):
        check_writable(f"{tmp_path}/file/x.png")


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    for out in (f"{tmp_path}/", f"{tmp_path}/x.png"):
        with pytest.raises(InvalidInputError, match=r"cannot be written \(Permission denied\); choose another path"):
            check_writable(out)


@pytest.mark.parametrize(
    ("out", "count", "channels", "size", "problem"),
    [
        ("x.png", 100_000, 3, (64, 64), "too large; give a folder"),
        ("x.webp", 4, 3, (16, 8200), "too large; give a folder"),
        ("x.webp", 4, 3, (16, 8000), ""),
        ("x.jpg", 1, 4, (8, 8), "JPEG stores no images with 4 channels"),
        ("x.png", 1, 4, (8, 8), ""),
        ("x.npy", 10**6, 3, (512, 512), ""),
        ("x/", 10**6, 3, (512, 512), ""),
    ],
)
def test_pictures_that_do_not_fit_into_the_file_are_refused(
    out: str, count: int, channels: int, size: tuple[int, int], problem: str
) -> None:
    if not problem:
        check_pictures(out, count, channels, size)
        return
    with pytest.raises(InvalidInputError, match=problem):
        check_pictures(out, count, channels, size)
