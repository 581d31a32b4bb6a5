"""runtime/io/arrays.py: arrays of strangers are never unpickled, and never larger than the machine's memory."""

from __future__ import annotations

import io
import pickle
import random
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.arrays import read_npy, read_npz


class Payload:
    """Unpickling it fails the test."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("it was unpickled",)


def claimed(header: str) -> bytes:
    """Return an npz file whose array has this header and 16 bytes."""
    stream, text = io.BytesIO(), header.encode() + b"\n"
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(16))
    return stream.getvalue()


def refused(path: Path, content: bytes, reason: str = "a.npz: ") -> None:
    path.write_bytes(content)
    with pytest.raises(InvalidInputError, match=reason):
        read_npz(path)


def test_arrays_are_read_by_name(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(3), y=np.ones(2))
    assert sorted(read_npz(tmp_path / "a.npz")) == ["x", "y"]
    assert list(read_npz(tmp_path / "a.npz", ["x"])) == ["x"]


def test_objects_are_never_unpickled(tmp_path: Path) -> None:
    stream = io.BytesIO()
    np.savez(stream, x=np.array([Payload()], dtype=object))
    refused(tmp_path / "a.npz", stream.getvalue(), "allow_pickle=False")
    refused(tmp_path / "a.npz", pickle.dumps(Payload()))
    (tmp_path / "a.npy").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(InvalidInputError):
        read_npy(tmp_path / "a.npy")


def test_an_archive_that_expands_beyond_the_memory_is_refused_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sysconf", lambda name: 2**10)  # a machine of 1 MiB
    np.savez_compressed(tmp_path / "a.npz", x=np.zeros(2**20, np.uint8))
    assert (tmp_path / "a.npz").stat().st_size < 2**12
    with pytest.raises(InvalidInputError, match=r"expands to 0\.0 GiB, more than this machine's memory"):
        read_npz(tmp_path / "a.npz")


@pytest.mark.parametrize("shape", ["(1048576, 1048576)", "(4294967296, 4294967296, 4294967296)", "(-1, 8)", "(99,)"])
def test_a_shape_without_its_data_is_refused(tmp_path: Path, shape: str) -> None:
    refused(
        tmp_path / "a.npz",
        claimed(str({"descr": "|u1", "fortran_order": False, "shape": "SHAPE"}).replace("'SHAPE'", shape)),
    )


@pytest.mark.parametrize(
    "header", ["__import__('os').abort()", "(" * 3000 + ")" * 3000, "{'descr': '|O', 'fortran_order': False}", "\0"]
)
def test_a_header_that_is_no_description_is_refused(tmp_path: Path, header: str) -> None:
    refused(tmp_path / "a.npz", claimed(header))


def test_a_file_of_an_archive_that_is_no_array_is_refused(tmp_path: Path) -> None:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("x", b"text")
    refused(tmp_path / "a.npz", stream.getvalue(), "'x' is no array")


def test_damaged_archives_give_one_error_or_the_same_arrays(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=np.arange(100))
    content, found = (tmp_path / "a.npz").read_bytes(), 0
    for seed in range(200):
        rng = random.Random(seed)
        at = rng.randrange(len(content))
        (tmp_path / "a.npz").write_bytes(content[:at] + rng.randbytes(rng.choice((1, 4))) + content[at + 2 :])
        try:
            values = read_npz(tmp_path / "a.npz")
        except InvalidInputError:
            found += 1
        else:
            assert "x" not in values or np.array_equal(values["x"], np.arange(100))
    assert found > 100
