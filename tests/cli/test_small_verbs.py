"""`info`, `recipes`, `init`, `doctor`, `--version`, and an example in the help of every verb."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest

from diffpress import __version__
from diffpress.cli.main import VERBS, main
from diffpress.runtime.bundle import MANIFEST, manifest_hash
from diffpress.runtime.errors import EXTRAS

ROOT = Path(__file__).parents[2]
TINY = ROOT / "tests" / "runtime" / "tiny_bundle"
FORMAT_1 = ROOT / "tests" / "fixtures" / "format_1"


def output(capsys: pytest.CaptureFixture[str], *words: object, code: int = 0) -> str:
    """Run one command in this process and return what it printed."""
    capsys.readouterr()
    try:
        found = main([str(word) for word in words])
    except SystemExit as stop:  # argparse's --help and --version
        found = int(stop.code or 0)
    said = capsys.readouterr()
    assert found == code, said.err
    return said.out if code == 0 else said.err


def test_recipes_lists_every_built_in_recipe_with_a_line_about_it(capsys: pytest.CaptureFixture[str]) -> None:
    lines = output(capsys, "recipes").splitlines()
    assert [line.split()[0] for line in lines] == ["icons", "int8", "quick", "smallest"]
    assert all(len(line.split(maxsplit=1)[1]) > 20 for line in lines)


def test_init_writes_a_recipe_that_can_be_read_and_overwrites_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("pydantic")
    from diffpress.compress.recipe import Recipe

    monkeypatch.chdir(tmp_path)
    assert "quick.yaml" in output(capsys, "init")
    assert Recipe.load("quick.yaml") == Recipe.load(ROOT / "compress" / "recipes" / "quick.yaml")
    assert "exists already" in output(capsys, "init", code=2)
    output(capsys, "init", "int8", "--out", tmp_path / "mine.yaml")
    assert "did you mean 'int8'" in output(capsys, "init", "int9", code=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.yaml", "quick.yaml"]


def test_schema_is_printed_or_written_to_a_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    pytest.importorskip("pydantic")
    printed = json.loads(output(capsys, "schema"))
    assert printed["title"] == "diffpress recipe"
    assert "yaml-language-server: $schema=" in output(capsys, "schema", "--out", tmp_path / "s.json")
    assert json.loads((tmp_path / "s.json").read_text()) == printed


def test_info_describes_a_bundle(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "info", FORMAT_1 / "bundle")
    assert "format 1" in text and "w4a8" in text and "3 steps of" in text and "output corrections" in text
    assert "prune -> distill -> quantize" in text and "onnxruntime" in text and "distilled" in text
    facts = json.loads(output(capsys, "info", TINY, "--json"))
    assert facts["kind"] == "bundle" and facts["plan"] == {
        "solver": "dpmpp_2m",
        "steps": 8,
        "guidance": 1.0,
        "output_corrections": False,
        "step_cache": None,
    }


def test_info_shows_what_the_steps_of_a_plan_evaluate(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "cached")
    manifest = json.loads((TINY / MANIFEST).read_text())
    cache = {"kind": "forecast", "steps": ["full", "forecast"] * 4, "order": 1, "cut": ""}
    manifest["spec"]["plan"]["cache"] = cache
    (tmp_path / "cached" / MANIFEST).write_text(json.dumps(manifest | {"hash": manifest_hash(manifest)}))
    assert "8 steps of dpmpp_2m, step cache: 4 full, 4 forecast (order 1)" in output(
        capsys, "info", tmp_path / "cached"
    )


def test_the_folder_of_a_compress_run_stands_for_its_bundle(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    shutil.copytree(TINY, tmp_path / "work" / "bundle")
    facts = json.loads(output(capsys, "info", tmp_path / "work", "--json"))
    assert facts["kind"] == "bundle" and facts["path"] == str(tmp_path / "work" / "bundle")


def test_info_describes_a_checkpoint_without_loading_its_weights(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torch")
    facts = json.loads(output(capsys, "info", FORMAT_1 / "checkpoint", "--json"))
    assert facts["kind"] == "checkpoint" and facts["family"] == "UNet2DModel" and facts["precision"] == "w4a8"
    assert facts["parameters"] == 36453 and facts["history"] == ["prune", "distill", "quantize"]
    monkeypatch.chdir(tmp_path)
    text = output(capsys, "info", "calib_data/teacher")  # built-in data is found in any folder
    assert "UNet2DModel" in text and "fp16" in text and "20 steps of dpmpp_2m" in text and "10 classes" in text


def test_info_refuses_what_is_neither(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "no such folder" in output(capsys, "info", tmp_path / "nothing", code=2)


def test_doctor_names_every_extra_and_engine(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys, "doctor")
    for name in ("compress", "openvino", "tensorrt", "text", "serve", "search", "sign", "onnxruntime"):
        assert re.search(rf"^(extra|engine) +{name} ", text, re.M), text
    assert __version__ in text and "onnxruntime runs here" in text


def test_doctor_says_what_to_install(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = output(capsys, "doctor")
    assert "missing tokenizers: pip install 'diffpress[text]'" in text and text.count("pip install") == len(EXTRAS)


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert output(capsys, "--version") == f"diffpress {__version__}\n"


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_has_an_example_that_parses(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    import argparse
    import importlib

    text = " ".join(output(capsys, verb, "--help").split())
    module = importlib.import_module(f"diffpress.cli.{verb}")
    assert f"example: {module.EXAMPLE}" in text
    command, found, *words = shlex.split(module.EXAMPLE)
    parser = argparse.ArgumentParser(exit_on_error=True)
    module.add_arguments(parser)
    assert (command, found) == ("diffpress", verb) and parser.parse_args(words) is not None


def test_cache_counts_and_removes_what_diffpress_stored_and_nothing_else(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path))
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", "2.5")
    stored = ["a.compiled", "b.compiled", "unlinked/hash/denoiser.onnx", "tensorrt/timing-1.cache"]
    for file in (*stored, ".c.compiled.7.partial", "mine.txt", "tensorrt/mine.txt"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(bytes(2**20))
    first, *kinds = output(capsys, "cache", "info").splitlines()
    assert str(tmp_path) in first and "2.0 MiB of 2560 (DIFFPRESS_CACHE_GIB)" in kinds[0]
    assert [line.split(" MiB")[0].split()[-2:] for line in kinds] == [["2", "2.0"], *[["1", "1.0"]] * 3]
    assert output(capsys, "cache", "clear").count("removed") == 4
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["mine.txt", "mine.txt"]
    assert "removed" not in output(capsys, "cache", "clear")


def test_cache_that_cannot_be_removed_is_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE", str(tmp_path))
    (tmp_path / "a.compiled").write_bytes(b"x")

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "unlink", refuse)
    said = output(capsys, "cache", "clear", code=2)
    assert "a.compiled: cannot be removed (Permission denied); change the folder's permissions" in said


def test_cache_refuses_a_limit_that_is_no_number(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIFFPRESS_CACHE_GIB", "plenty")
    assert "DIFFPRESS_CACHE_GIB=plenty: give a number of GiB" in output(capsys, "cache", "info", code=2)


@pytest.mark.parametrize("content", [b"", b"\x80\x05pickle", b"\xff" * 8 + b"{}", b"\x02" + bytes(7) + b"[]"])
def test_info_refuses_weights_that_are_not_safetensors_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, content: bytes
) -> None:
    pytest.importorskip("torch")
    folder = Path(shutil.copytree(FORMAT_1 / "checkpoint", tmp_path / "checkpoint"))
    next((folder / "unet").glob("*.safetensors")).write_bytes(content)
    said = output(capsys, "info", folder, code=2)
    assert "not readable as safetensors" in said and said.count("\n") == 1


def test_info_shows_hostile_names_as_escapes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(TINY, tmp_path / "bundle"))
    manifest = json.loads((folder / MANIFEST).read_text()) | {
        "family": "\x1b[2J\r\nfake",
        "history": [{"stage": "\x07"}],
    }
    manifest["hash"] = manifest_hash(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest))
    said = output(capsys, "info", folder)
    assert r"\x1b[2J\r\nfake" in said and r"\x07" in said and "\x1b" not in said
