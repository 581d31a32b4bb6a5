"""export/model_card.py: the README.md of a bundle repeats its manifest and scores, and nothing breaks its tables."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from diffpress.compress.checkpoint import Checkpoint, Record
from diffpress.compress.config import ExportConfig
from diffpress.compress.sources.terms import BASE_CARD, CARD
from diffpress.export.bundle import export_bundle
from diffpress.export.model_card import PICTURE, base_licence, write_model_card
from diffpress.runtime.bundle import Bundle, load_bundle

SCORE: dict[str, Any] = {
    "samples": 100,
    "seeds": 3,
    "features": {"name": "feat|ures"},
    "frechet": {"mean": 0.5, "sd": 0.1, "floor": 0.25},
    "kid": {"mean": 0.01, "sd": 0.001},
    "paired": None,
}


@pytest.fixture(scope="module")
def exported(wide: Checkpoint, tmp_path_factory: pytest.TempPathFactory) -> Path:
    history = (Record("prune", {"kind": "width"}, 0, {"parameters": [2000, 1000]}, "aa", "bb", seconds=1.0),)
    folder = tmp_path_factory.mktemp("model_card") / "bundle"
    config = ExportConfig(targets=("onnx",), threads=1)
    return export_bundle(wide.evolve(history=history), folder, config, metrics={"macs_ratio": 0.5}).path


@pytest.fixture
def bundle(exported: Path, tmp_path: Path) -> Bundle:
    return load_bundle(shutil.copytree(exported, tmp_path / "bundle"))


def card(bundle: Bundle) -> str:
    return (bundle.path / CARD).read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---\n")[1])
    return found


def test_it_repeats_the_manifest(bundle: Bundle) -> None:
    text, denoiser = card(bundle), bundle.manifest["graphs"]["denoiser"]
    assert f"| parameters of the denoiser | {denoiser['parameters']:,} |" in text
    assert f"{bundle.spec.plan.steps} steps of {bundle.spec.plan.solver}" in text
    assert "| prune: width | 1,000 |  |" in text and "uncompressed model's | 0.500 |" in text
    assert front_matter(text)["library_name"] == "diffpress"
    assert "license" not in front_matter(text) and "came without licence files" in text
    assert load_bundle(bundle.path).hash == bundle.hash


def test_it_shows_the_scores_and_the_picture_of_a_run(bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "picture.png").write_bytes(b"png")
    scores = {"baseline": SCORE, "bundle": SCORE | {"paired": {"psnr_db": 31.25, "ssim": 0.9}}}
    write_model_card(bundle, scores, tmp_path / "picture.png")
    text = card(bundle)
    assert "0.500 ± 0.100 | 0.500 ± 0.100 |" in text and "3 x 100, real images 0.250" in text and "31.2 dB" in text
    assert f"({PICTURE})" in text and (bundle.path / PICTURE).read_bytes() == b"png"
    write_model_card(bundle)  # of a run that could not sample
    assert PICTURE not in card(bundle) and not (bundle.path / PICTURE).exists()


def test_the_licence_is_that_of_the_checkpoint_s_card(bundle: Bundle) -> None:
    (bundle.path / BASE_CARD).write_text("---\nlicense: openrail++\ntags: [x]\n---\n# Model\n")
    write_model_card(bundle)
    assert front_matter(card(bundle))["license"] == "openrail++"
    assert "under `openrail++`" in card(bundle)


@pytest.mark.parametrize(
    "text", ["", "# no block", "---\nlicense: mit", "---\n[a\n---\n", "---\nlicense: [mit]\n---\n", "---\n- x\n---\n"]
)
def test_a_card_without_a_licence_states_none(tmp_path: Path, text: str) -> None:
    (tmp_path / BASE_CARD).write_text(text)
    assert base_licence(tmp_path) == {}


def test_hostile_names_do_not_leave_their_cell(bundle: Bundle) -> None:
    manifest = bundle.manifest | {"name": "a | <script>\n# b", "family": "`c`"}
    write_model_card(Bundle(bundle.path, bundle.spec, manifest), {"baseline": SCORE, "bundle": SCORE})
    text = card(bundle)
    assert "# a  script b\n" in text and "<" not in text and "feat|ures" not in text


def test_a_card_that_the_manifest_verifies_is_left_alone(bundle: Bundle) -> None:
    (bundle.path / CARD).write_text("the checkpoint's own")
    files = {**bundle.manifest["files"], CARD: {}}
    write_model_card(Bundle(bundle.path, bundle.spec, bundle.manifest | {"files": files}))
    assert card(bundle) == "the checkpoint's own"
