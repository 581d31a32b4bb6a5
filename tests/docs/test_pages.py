"""The pages of the site: commands parse, recipes are valid, Python compiles and runs, the navigation is complete."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest
import yaml

from diffpress.cli.main import VERBS
from diffpress.compress.recipe import Recipe

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
NAMES = [page.relative_to(DOCS).as_posix() for page in PAGES]
USERS_MODEL = "# your model"  # marks Python that needs a model of the reader


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> list[list[str]]:
    """The words of every command of diffpress in the page's shell blocks, from the verb on."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        words = shlex.split(line, comments=True)
        if "diffpress" in words:
            found.append(words[words.index("diffpress") + 1 :])
    return found


def in_navigation(entry: object) -> list[str]:
    if isinstance(entry, str):
        return [entry]
    children = entry if isinstance(entry, list) else list(entry.values())  # type: ignore[attr-defined]
    return [page for child in children for page in in_navigation(child)]


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_command_on_a_page_parses(page: Path) -> None:
    for verb, *words in commands(page):
        assert verb in VERBS
        parser = ArgumentParser(exit_on_error=False)
        importlib.import_module(f"diffpress.cli.{verb}").add_arguments(parser)
        parser.parse_args(words)


def test_there_are_commands_to_parse() -> None:
    assert sum(len(commands(page)) for page in PAGES) > 20


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_every_recipe_on_a_page_is_valid(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(blocks(page, "yaml")):
        recipe = yaml.safe_load(text)
        if isinstance(recipe, list):  # the entry of one stage
            recipe = {"stages": recipe}
        # a single stage may be shown without what has to come before it
        if [*recipe["stages"][0]] == ["distill"] and recipe["stages"][0]["distill"]["kind"] == "recover":
            recipe["stages"].insert(0, "prune")
        file = tmp_path / f"{number}.yaml"
        file.write_text(yaml.safe_dump(recipe))
        assert Recipe.load(file).stages


@pytest.mark.parametrize("page", PAGES, ids=NAMES)
def test_the_python_on_a_page_compiles(page: Path) -> None:
    for text in blocks(page, "python"):
        compile(text, page.name, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "python")], ids=lambda page: page.stem)
def test_the_python_on_a_page_runs(page: Path, tmp_path: Path) -> None:
    (tmp_path / "calib_data").symlink_to(ROOT / "calib_data")
    code = "\n".join(text for text in blocks(page, "python") if USERS_MODEL not in text)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_page_is_in_the_navigation() -> None:
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    listed = in_navigation(yaml.safe_load(config)["nav"])
    assert sorted(page for page in listed if not page.startswith("benchmarks/")) == NAMES
