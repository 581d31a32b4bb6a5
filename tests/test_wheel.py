"""The wheel: `diffpress/` and nothing else, with recipes and data inside; it works beside folders of our names."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = ("diffpress", "calib_data", "pyproject.toml", "README.md", "LICENSE", "NOTICE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the sources, without the symbolic links, as a Windows checkout has them."""
    pytest.importorskip("hatchling")
    copy = tmp_path_factory.mktemp("checkout")
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copyfile(source, copy / name)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(copy / "dist"),
        ".",
    ]
    done = subprocess.run(command, cwd=copy, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = (copy / "dist").glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder


def test_the_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert "diffpress" in tops and all(top == "diffpress" or top.endswith(".dist-info") for top in tops)
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "diffpress").rglob("*.py")}
    assert code <= set(names) and {"diffpress/py.typed", "diffpress/serve/web/page.html"} <= set(names)
    templates = (ROOT / "diffpress" / "compress" / "report" / "templates").iterdir()
    assert {path.relative_to(ROOT).as_posix() for path in templates} <= set(names)
    page = (ROOT / "diffpress" / "export" / "targets" / "web" / "page").iterdir()
    assert {path.relative_to(ROOT).as_posix() for path in page} <= set(names)


def test_recipes_and_data_are_inside_it(installed: Path) -> None:
    data = {path.relative_to(ROOT / "calib_data") for path in (ROOT / "calib_data").rglob("*") if path.is_file()}
    assert data and all((installed / "diffpress" / "calib_data" / path).is_file() for path in data)
    code = (
        "from diffpress.compress.builtin import *\n"
        "print(TEACHER, FEATURES.is_file(), len(list(RECIPES.glob('*.yaml'))))"
    )
    done = run(["-c", code], installed, installed)
    assert done.stdout.split() == [str(installed / "diffpress" / "calib_data" / "teacher"), "True", "4"], done.stderr


def test_every_licence_is_stated_in_its_metadata(wheel: Path) -> None:
    names = [name.partition("/licenses/")[2] for name in zipfile.ZipFile(wheel).namelist() if "/licenses/" in name]
    licences = {path.relative_to(ROOT).as_posix() for path in (ROOT / "calib_data" / "licences").iterdir()}
    assert set(names) == {"LICENSE", "NOTICE"} | licences


def test_a_checkout_without_the_links_finds_its_data(tmp_path: Path) -> None:
    (tmp_path / "calib_data").mkdir()
    shutil.copytree(ROOT / "diffpress", tmp_path / "diffpress", ignore=shutil.ignore_patterns("__pycache__"))
    done = run(["-c", "from diffpress.compress.builtin import CALIB_DATA; print(CALIB_DATA)"], tmp_path, tmp_path)
    assert done.stdout.strip() == str(tmp_path / "calib_data"), done.stderr


def test_it_works_in_a_folder_that_has_folders_of_our_names(installed: Path, tmp_path: Path) -> None:
    for name in ("compress", "export", "runtime"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise RuntimeError('the folder of the user was imported')\n")
    bundle = ROOT / "tests" / "runtime" / "tiny_bundle"
    command = ["-m", "diffpress", "sample", str(bundle), "-n", "2", "--engine", "onnxruntime", "--out", "a.png"]
    done = run(command, installed, tmp_path)
    assert done.returncode == 0 and (tmp_path / "a.png").is_file(), done.stderr
    done = run(["-m", "diffpress", "bench", str(bundle), "--batch", "1", "--repeats", "1"], installed, tmp_path)
    assert done.returncode == 0, done.stderr


def run(words: list[str], site: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Python with the unpacked wheel first on its path."""
    environment = os.environ | {"PYTHONPATH": str(site)}
    return subprocess.run([sys.executable, *words], cwd=cwd, env=environment, capture_output=True, text=True)
