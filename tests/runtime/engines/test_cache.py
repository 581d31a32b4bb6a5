"""runtime/engines/cache.py: entries are read back byte for byte, or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from diffpress.runtime.engines.cache import Cache, cache_folder, limit_bytes
from diffpress.runtime.errors import InvalidInputError


def entries(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir())


def test_an_entry_is_read_back_by_another_cache_object(tmp_path: Path) -> None:
    Cache(tmp_path / "c", "graph").write("key", b"data")
    again = Cache(tmp_path / "c", "graph")
    assert again.read("key") == b"data" and again.read("other") is None
    assert Cache(tmp_path / "c").of("other graph").read("key") is None


def test_without_a_graph_nothing_is_stored(tmp_path: Path) -> None:
    Cache(tmp_path).write("key", b"data")
    assert entries(tmp_path) == [] and Cache(tmp_path).read("key") is None


@pytest.mark.parametrize("at", range(0, 40, 3))
def test_a_flipped_bit_anywhere_invalidates_an_entry(tmp_path: Path, at: int) -> None:
    cache = Cache(tmp_path, "graph")
    cache.write("key", b"datadata")
    (file,) = entries(tmp_path)
    content = bytearray(file.read_bytes())
    content[at] ^= 4
    file.write_bytes(content)
    assert cache.read("key") is None


@pytest.mark.parametrize("length", [0, 5, 32, 39])
def test_a_truncated_file_is_invalid_and_is_overwritten(tmp_path: Path, length: int) -> None:
    cache = Cache(tmp_path, "graph")
    cache.write("key", b"datadata")
    (file,) = entries(tmp_path)
    file.write_bytes(file.read_bytes()[:length])
    assert cache.read("key") is None
    cache.write("key", b"datadata")
    assert cache.read("key") == b"datadata" and entries(tmp_path) == [file]


def test_a_file_under_the_name_of_another_entry_is_invalid(tmp_path: Path) -> None:
    cache = Cache(tmp_path, "graph")
    cache.write("a", b"of a")
    (a,) = entries(tmp_path)
    cache.write("b", b"of b")
    (b,) = set(entries(tmp_path)) - {a}
    a.write_bytes(b.read_bytes())
    assert cache.read("a") is None and cache.read("b") == b"of b"


def test_an_unwritable_folder_stores_nothing_and_raises_nothing(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    cache = Cache(tmp_path / "file", "graph")
    cache.write("key", b"data")
    assert cache.read("key") is None


def test_the_least_recently_used_entry_is_evicted_and_other_files_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = Cache(tmp_path, "graph")
    (tmp_path / "precious").write_bytes(b"x" * 1000)
    for number, key in enumerate("abc"):
        cache.write(key, b"x" * 68)  # 100 bytes with its digest
        (newest,) = set(tmp_path.glob("*.compiled")) - {path for path in tmp_path.iterdir() if path.stat().st_mtime < 9}
        os.utime(newest, (number + 1, number + 1))
    assert cache.read("a") is not None  # now the most recently used
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", str(300 / 2**30))
    cache.write("d", b"x" * 68)
    assert [key for key in "abcd" if cache.read(key) is None] == ["b"] and (tmp_path / "precious").exists()


def test_an_entry_above_the_size_limit_is_not_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", str(7 / 2**30))
    Cache(tmp_path, "graph").write("key", b"datadata")
    assert entries(tmp_path) == []


def test_a_limit_of_0_stores_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", "0")
    Cache(tmp_path, "graph").write("key", b"d")
    assert entries(tmp_path) == []


def test_what_a_killed_process_left_is_removed_later(tmp_path: Path) -> None:
    left, recent = tmp_path / ".a.compiled.7.partial", tmp_path / ".b.compiled.8.partial"
    for path in (left, recent):
        path.write_bytes(b"half")
    os.utime(left, (1, 1))
    Cache(tmp_path, "graph").write("key", b"data")
    assert not left.exists() and recent.exists() and len(entries(tmp_path)) == 2


@pytest.mark.parametrize("value", ["much", "-1", "nan", "inf"])
def test_a_limit_that_is_no_number_is_refused_by_its_name(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", value)
    with pytest.raises(InvalidInputError, match=f"DIFFPRESS_CACHE_GIB={value}: give a number"):
        limit_bytes()


def test_the_cache_folder_follows_the_environment_variables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
    monkeypatch.delenv("DIFFPRESS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "diffpress"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "diffpress"
