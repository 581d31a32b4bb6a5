"""compress/sources/terms.py: a checkpoint's licence is in every checkpoint and bundle made from it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpress.compress.checkpoint import save_checkpoint
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.load import load_checkpoint
from diffpress.compress.sources.terms import BASE_CARD, CARD, read_terms, stated_terms
from diffpress.export.bundle import export_bundle

TERMS = {
    "LICENSE.md": b"CreativeML Open RAIL-M",
    "Notice": b"Copyright the makers",
    "use_policy.txt": b"Not for ...\xff",
    "README.md": b"---\nlicense: creativeml-openrail-m\n---\n",
}


@pytest.fixture
def licensed(tiny_folder: Callable[..., Path], tmp_path: Path) -> Path:
    folder = shutil.copytree(tiny_folder("sd"), tmp_path / "licensed")
    for name, content in TERMS.items():
        (folder / name).write_bytes(content)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TERMS}


def test_a_licence_is_kept_in_checkpoints_and_bundles(licensed: Path, tmp_path: Path) -> None:
    save_checkpoint(load_checkpoint(licensed), tmp_path / "stage")
    assert contents(tmp_path / "stage") == TERMS
    bundle = export_bundle(load_checkpoint(tmp_path / "stage"), tmp_path / "bundle", ExportConfig(targets=("onnx",)))
    kept = {BASE_CARD if name == CARD else name: content for name, content in TERMS.items()}
    assert {name: (bundle.path / name).read_bytes() for name in kept} == kept
    assert kept.keys() <= json.loads((bundle.path / "manifest.json").read_text())["files"].keys()
    assert "license: creativeml-openrail-m" in (bundle.path / CARD).read_text()


def test_only_licences_and_the_model_card_are_kept(tmp_path: Path) -> None:
    for name in (*TERMS, "license.py", "license_plates.npz", "terms.safetensors", "notes.txt", "noticeboard.md"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "LICENSES").mkdir()
    assert read_terms(tmp_path).keys() == TERMS.keys()


def test_a_bare_denoiser_has_the_licence_of_its_pipeline(licensed: Path) -> None:
    assert load_checkpoint(licensed / "unet").source.terms == TERMS


def test_a_single_file_states_its_licence_in_its_header() -> None:
    (name, content), *others = stated_terms({"modelspec.license": "OpenRAIL-M", "format": "pt"}).items()
    assert name == "LICENSE.txt" and b"OpenRAIL-M" in content and not others
    assert stated_terms({"format": "pt", "license": " "}) == {}
