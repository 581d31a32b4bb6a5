"""runtime/bundle.py: a bundle opens if every byte is as it was sealed, and is refused otherwise."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffpress.runtime.bundle import MANIFEST, load_bundle, manifest_hash, seal
from diffpress.runtime.errors import InvalidInputError


@pytest.fixture
def copy(tiny: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny, tmp_path / "bundle"))


def edit(folder: Path, change: Callable[[dict[str, Any]], Any], rehash: bool = True) -> None:
    """Change the manifest; `rehash` also updates its hash, as a deliberate change would."""
    manifest = json.loads((folder / MANIFEST).read_text())
    change(manifest)
    if rehash:
        manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))


def test_an_intact_bundle_opens_from_any_folder(tiny: Path, copy: Path) -> None:
    first, second = load_bundle(tiny), load_bundle(str(copy))
    assert first.spec == second.spec and first.hash == second.hash
    assert second.denoiser == copy / "denoiser.onnx" and first.spec.conditioning.classes == 3


def test_every_graph_is_found_by_its_name(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["graphs"].update(vae_decoder={"file": "denoiser.onnx"}))
    bundle = load_bundle(copy)
    assert bundle.graph("denoiser") == bundle.graph("vae_decoder") == bundle.denoiser == copy / "denoiser.onnx"
    with pytest.raises(InvalidInputError, match=r"has no text_encoder \(it has denoiser, vae_decoder\)"):
        bundle.graph("text_encoder")


def test_an_engine_gets_its_variant_and_all_others_the_main_graph(copy: Path) -> None:
    shutil.copy(copy / "denoiser.onnx", copy / "denoiser.float.onnx")
    content = {k: v for k, v in load_bundle(copy).manifest.items() if k not in ("format", "files", "hash")}
    content["graphs"]["denoiser"]["variants"] = {"openvino": {"file": "denoiser.float.onnx", "precision": "fp32"}}
    seal(copy, content)
    bundle = load_bundle(copy)
    assert bundle.graph("denoiser", "openvino") == copy / "denoiser.float.onnx"
    assert bundle.graph("denoiser", "onnxruntime") == bundle.graph("denoiser") == bundle.denoiser
    assert bundle.spec_for("openvino") == bundle.spec_for("onnxruntime") == bundle.spec  # nothing to correct


def test_sealing_the_same_files_again_gives_the_same_hash(copy: Path) -> None:
    before = load_bundle(copy)
    content = {key: value for key, value in before.manifest.items() if key not in ("format", "files", "hash")}
    assert seal(copy, content)["hash"] == before.hash


def test_a_flipped_byte_is_detected(copy: Path) -> None:
    data = bytearray((copy / "denoiser.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (copy / "denoiser.onnx").write_bytes(data)
    with pytest.raises(InvalidInputError, match=r"denoiser\.onnx: does not match its sha256"):
        load_bundle(copy)


def test_a_truncated_file_is_detected(copy: Path) -> None:
    (copy / "denoiser.onnx").write_bytes((copy / "denoiser.onnx").read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match="is damaged"):
        load_bundle(copy)


def test_a_missing_file_is_detected(copy: Path) -> None:
    (copy / "denoiser.onnx").unlink()
    with pytest.raises(InvalidInputError, match="listed in the manifest but missing"):
        load_bundle(copy)


def test_an_edited_manifest_is_detected(copy: Path) -> None:
    edit(copy, lambda manifest: manifest["spec"]["plan"].update(guidance=3.0), rehash=False)
    with pytest.raises(InvalidInputError, match="was changed"):
        load_bundle(copy)


def absolute(manifest: dict[str, Any]) -> None:
    manifest["files"]["/etc/hostname"] = manifest["files"]["denoiser.onnx"]


def upwards(manifest: dict[str, Any]) -> None:
    manifest["files"]["../outside.onnx"] = manifest["files"]["denoiser.onnx"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (absolute, "points outside the bundle"),
        (upwards, "points outside the bundle"),
        (lambda m: m.update(format=3), "bundle format 3"),
        (lambda m: m.pop("files"), "no list of files"),
        (lambda m: m.update(files=[]), "no list of files"),
        (lambda m: m.update(graphs={}), "no denoiser graph"),
        (lambda m: m.update(graphs={"denoiser": "denoiser.onnx"}), "no denoiser graph"),
        (lambda m: m["graphs"]["denoiser"].update(file="other.onnx"), "not among the listed files"),
        (lambda m: m["graphs"]["denoiser"].update(file=["denoiser.onnx"]), "not among the listed files"),
        (lambda m: m["graphs"]["denoiser"].update(variants={"openvino": {"file": "x.onnx"}}), "not among the listed"),
        (lambda m: m["graphs"]["denoiser"].update(variants=["openvino"]), "not among the listed files"),
        (lambda m: m["graphs"].update(vae_decoder={"file": "other.onnx"}), "the vae_decoder's file is not among"),
        (lambda m: m["graphs"].update(vae_decoder="denoiser.onnx"), "the vae_decoder's file is not among"),
        (lambda m: m["files"].update({"denoiser.onnx": None}), "no size and sha256"),
        (lambda m: m.update(engines={}), "an entry of 'engines'"),
        (lambda m: m.update(engines=["tensorrt"]), "an entry of 'engines'"),
        (lambda m: m.update(engines=[{"engine": "tensorrt"}]), "an entry of 'engines'"),
        (lambda m: m.update(engines=[{"engine": "e", "graph": "g", "file": "x.engine"}]), "a file that is not listed"),
        (lambda m: m.pop("spec"), "spec: expected a JSON object"),
        (lambda m: m["spec"].update(prediction="noise"), "prediction 'noise'"),
    ],
)
def test_invalid_manifests_are_refused(copy: Path, change: Callable[[dict[str, Any]], object], message: str) -> None:
    (copy.parent / "outside.onnx").write_bytes((copy / "denoiser.onnx").read_bytes())
    edit(copy, change)
    with pytest.raises(InvalidInputError, match=message):
        load_bundle(copy)


def test_a_bundle_of_links_opens_if_their_content_is_as_it_was_sealed(copy: Path) -> None:
    """As in a hub cache, where every file is a link to a blob beside the folder."""
    outside = copy.parent / "outside.onnx"
    shutil.move(copy / "denoiser.onnx", outside)
    (copy / "denoiser.onnx").symlink_to(outside)
    assert load_bundle(copy).denoiser == copy / "denoiser.onnx"
    outside.write_bytes(outside.read_bytes()[:-1])
    with pytest.raises(InvalidInputError, match="is damaged"):
        load_bundle(copy)


@pytest.mark.parametrize("content", [b"{", b"[]", b"", b"\xff\xfe\x00"])
def test_a_manifest_that_is_not_a_json_object_is_refused(copy: Path, content: bytes) -> None:
    (copy / MANIFEST).write_bytes(content)
    with pytest.raises(InvalidInputError, match=MANIFEST):
        load_bundle(copy)


def test_a_folder_without_a_manifest_is_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a bundle"):
        load_bundle(tmp_path)
