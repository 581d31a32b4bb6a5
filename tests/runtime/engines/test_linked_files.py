"""runtime/engines/linked_files.py: a bundle whose files are links to blobs named by their hash, as in a hub cache."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffpress.runtime.bundle import load_bundle, sha256
from diffpress.runtime.engines.linked_files import without_links
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.pipeline import Pipeline


def linked(folder: Path, cache: Path) -> Path:
    """Lay out a folder as the hub's client does: snapshots/<revision>/<file> -> ../../blobs/<hash>."""
    snapshot = cache / "snapshots" / "abc"
    for file in [file for file in folder.rglob("*") if file.is_file()]:
        blob, link = cache / "blobs" / sha256(file), snapshot / file.relative_to(folder)
        for parent in (blob.parent, link.parent):
            parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_a_bundle_of_links_samples_the_same_images(engine: str, sd_bundle: Path, tmp_path: Path) -> None:
    pytest.importorskip(engine)
    images = []
    for folder in (sd_bundle, linked(sd_bundle, tmp_path / "hub")):
        with Pipeline(folder, engine=engine) as pipe:
            images.append(pipe(["a photo of a cat"], seeds=[0]))
    np.testing.assert_array_equal(images[0], images[1])


def test_a_bundle_without_links_is_read_where_it_is(tiny: Path) -> None:
    bundle = load_bundle(tiny)
    assert without_links(bundle, bundle.denoiser) == bundle.denoiser


def test_the_folder_without_links_takes_no_space_and_is_made_once(
    tiny: Path, tmp_path: Path, temporary_cache: Path
) -> None:
    bundle = load_bundle(linked(tiny, tmp_path / "hub"))
    graph = without_links(bundle, bundle.denoiser)
    assert temporary_cache in graph.parents and not graph.is_symlink()
    assert graph.read_bytes() == bundle.denoiser.read_bytes()
    if tmp_path.stat().st_dev == temporary_cache.stat().st_dev:
        assert graph.samefile(bundle.denoiser)
    before = graph.parent.stat().st_ino
    assert without_links(bundle, bundle.denoiser) == graph and graph.parent.stat().st_ino == before
    graph.unlink()  # a cleaned cache is filled again
    assert without_links(bundle, bundle.denoiser).is_file()
    assert [entry.name for entry in graph.parent.parent.iterdir()] == [graph.parent.name]


def test_a_cache_that_cannot_be_written_is_one_line(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = load_bundle(linked(tiny, tmp_path / "hub"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(InvalidInputError, match=r"files are links.*DIFFPRESS_CACHE") as caught:
        without_links(bundle, bundle.denoiser)
    assert "\n" not in str(caught.value)
