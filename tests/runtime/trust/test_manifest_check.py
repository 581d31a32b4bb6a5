"""Manifests of strangers: sealed by whoever made them, and still refused if an entry could do harm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash
from diffpress.runtime.errors import InvalidInputError

Edited = Callable[..., Path]


@pytest.fixture
def edited(tiny: Path, tmp_path: Path) -> Edited:
    """Copy the tiny bundle with one entry of its manifest replaced, and seal it again."""

    def edit(*path: str, value: Any) -> Path:
        folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
        manifest = json.loads((folder / MANIFEST).read_text())
        inner = manifest
        for key in path[:-1]:
            inner = inner[key]
        inner[path[-1]] = value
        manifest["hash"] = manifest_hash(manifest)
        (folder / MANIFEST).write_text(json.dumps(manifest))
        return folder

    return edit


def refused(folder: Path, reason: str) -> None:
    with pytest.raises(InvalidInputError, match=reason) as error:
        load_bundle(folder)
    assert len(str(error.value).splitlines()) == 1 or "\n" in str(folder)


@pytest.mark.parametrize("tokenizer", ["../../etc", "/etc", "tokenizer"])
def test_a_tokenizer_that_is_not_listed_is_refused(edited: Edited, tokenizer: str) -> None:
    encoder = {"graph": "denoiser", "tokenizer": tokenizer, "length": 4, "pad": 0, "lower": False}
    text = {"kind": "text", "encoders": [encoder], "inputs": {"x": {"shape": [4], "rows": [["denoiser.x"]]}}}
    refused(edited("spec", "conditioning", value=text), r"tokenizer\.json' is not among the listed files")


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("history",), [1]),
        (("history",), "x"),
        (("history",), [{"stage": 1}]),
        (("parity_failures",), 7),
        (("parity_failures",), [{"engine": "x", "target": 1, "message": "x"}]),
        (("graphs", "denoiser", "precision"), 8),
        (("graphs", "denoiser", "inputs"), [1]),
        (("graphs", "denoiser", "bytes"), "many"),
    ],
)
def test_an_entry_of_a_wrong_type_is_refused_when_the_bundle_is_opened(
    edited: Edited, path: tuple[str, ...], value: Any
) -> None:
    refused(edited(*path, value=value), "wrong type")


@pytest.mark.parametrize(
    ("name", "reason"), [("x" * 10_000, "cannot be read"), ("a\0b", "missing"), ("\ud800", "surrogates")]
)
def test_a_name_that_no_file_can_have_is_refused(edited: Edited, name: str, reason: str) -> None:
    refused(edited("files", name, value={"bytes": 1, "sha256": ""}), reason)


@pytest.mark.parametrize("depth", [100, 900, 100_000])
def test_a_manifest_that_is_nested_deeply_is_refused(tiny: Path, tmp_path: Path, depth: int) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    (folder / MANIFEST).write_text(f'{{"format": 2, "x": {"[" * depth}{"]" * depth}}}')
    refused(folder, "nested deeper|recursion")


def test_a_manifest_of_a_terabyte_is_refused_without_reading_it(tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny, tmp_path / "bundle"))
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(2**40)
    refused(folder, "larger than 256 MiB")
