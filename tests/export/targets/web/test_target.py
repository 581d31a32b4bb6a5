"""Target web without a browser: the folder, its manifest, and what is refused before any work."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from diffpress.cli.main import main
from diffpress.compress.checkpoint import Checkpoint
from diffpress.export.graph.model import Graph
from diffpress.export.summary import summary
from diffpress.export.targets.web.onnxruntime_web import FILES, INSTALL, VERSION, find_web_runtime
from diffpress.export.targets.web.tokenizer_check import check_tokenizer
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.errors import InvalidInputError
from tests.export.oracle import exported
from tests.export.targets.web.test_modules import PAGE, TOKENIZER

TEACHER = TOKENIZER.parents[3] / "teacher"
RUNTIME_FILES = [name for names in FILES.values() for name in names]


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """Folder with the names of the npm package's files."""
    folder = tmp_path / "node_modules" / "onnxruntime-web"
    (folder / "dist").mkdir(parents=True)
    (folder / "package.json").write_text(json.dumps({"name": "onnxruntime-web", "version": VERSION}))
    for name in [*RUNTIME_FILES, "ort.js"]:
        (folder / "dist" / name).write_text(name)
    return folder


def test_the_folder_has_the_page_the_sampler_and_the_runtime(
    unet: Checkpoint, unet_graph: Graph, package: Path, tmp_path: Path
) -> None:
    bundle = exported(unet, tmp_path / "bundle", ["web"], float_graph=unet_graph, web_runtime=str(package), threads=1)
    web = bundle.path / "web"
    found = {path.relative_to(web).as_posix() for path in web.rglob("*") if path.is_file()}
    page = {path.name for path in PAGE.iterdir()}
    assert found == page | {"sampler.onnx", "sampler.json", "ort/LICENSE"} | {f"ort/{name}" for name in RUNTIME_FILES}
    for name in ("sampler.onnx", "sampler.json"):
        assert (web / name).read_bytes() == (bundle.path / name).read_bytes()
    assert all((web / "ort" / name).read_text() == name for name in RUNTIME_FILES)
    size = sum(path.stat().st_size for path in web.rglob("*") if path.is_file())
    assert bundle.manifest["web"] == {"folder": "web", "onnxruntime_web": VERSION, "bytes": size}
    assert f"web/: {size / 2**20:.1f} MiB with ONNX Runtime Web {VERSION}" in "\n".join(summary(bundle))
    assert load_bundle(bundle.path).hash == bundle.hash


def test_the_page_names_no_other_origin() -> None:
    for file in PAGE.iterdir():
        assert not re.search(r"(https?:|wss?:|src=.?)//", file.read_text(encoding="utf-8")), file.name
    policy = (PAGE / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in policy and "connect-src 'self'" in policy and "unsafe-inline" not in policy


def test_every_file_that_the_page_names_is_in_the_folder() -> None:
    named = set()
    for file in PAGE.iterdir():
        named |= set(re.findall(r'"(?:\./)?([\w-]+\.(?:js|css|html))"', file.read_text(encoding="utf-8")))
    assert named == {path.name for path in PAGE.iterdir()} - {"index.html"}
    entry_points = {f"ort.{engine}.min.mjs" for engine in FILES}
    assert entry_points == {names[0] for names in FILES.values()}, "worker.js imports ort/ort.ENGINE.min.mjs"


def test_the_package_is_found_in_node_modules_above(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    below = package.parents[1] / "a" / "b"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert find_web_runtime() == (package, VERSION)


@pytest.mark.parametrize(
    "words", [["export", "--targets", "web"], ["compress", "--recipe", "quick", "--set", "export.targets=[web]"]]
)
def test_a_missing_package_is_refused_with_the_command_to_run(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    verb, *options = words
    assert main([verb, str(TEACHER), *options, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert f"run '{INSTALL}', or give its folder with --web-runtime" in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "package.json").unlink(), "not the npm package onnxruntime-web"),
        (lambda folder: (folder / "package.json").write_text("{"), "not the npm package onnxruntime-web"),
        (
            lambda folder: (folder / "package.json").write_text('{"name": "other", "version": "1"}'),
            "not the npm package",
        ),
        (lambda folder: (folder / "dist" / RUNTIME_FILES[-1]).unlink(), f"has no dist/{RUNTIME_FILES[-1]}; use the"),
    ],
)
def test_a_folder_that_is_not_the_package_is_refused(
    damage: Callable[[Path], object], message: str, package: Path
) -> None:
    damage(package)
    with pytest.raises(InvalidInputError, match=message) as caught:
        find_web_runtime(package)
    assert "\n" not in str(caught.value) and INSTALL in str(caught.value)


def test_clip_tokenizers_are_supported_and_others_refused_by_name() -> None:
    content = json.loads(TOKENIZER.read_text(encoding="utf-8"))
    check_tokenizer("tokenizer", content)
    vector = {**content["added_tokens"][0], "content": "<cat>"}
    for changed, message in (
        ({"model": {**content["model"], "type": "Unigram"}}, "tokenizer_2 has a Unigram model; the page has CLIP's"),
        ({"normalizer": None}, "another normalization"),
        ({"pre_tokenizer": {"type": "ByteLevel"}}, "another way to split words"),
        ({"post_processor": {"type": "TemplateProcessing"}}, "special tokens of kind TemplateProcessing"),
        ({"model": {**content["model"], "end_of_word_suffix": None}}, "no </w> at the end of words"),
        ({"model": {**content["model"], "byte_fallback": True}}, "merges with options"),
        ({"added_tokens": [*content["added_tokens"], {**vector, "normalized": True}]}, "added tokens with options"),
        (
            {"added_tokens": [*content["added_tokens"], vector, {**vector, "content": "<cat>_1"}]},
            "textual inversions of several vectors",
        ),
    ):
        with pytest.raises(InvalidInputError, match=message):
            check_tokenizer("tokenizer_2", {**content, **changed})
