"""compress/recipe_text.py: recipes of strangers are plain values of a moderate size."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml

from diffpress.compress.recipe import Recipe
from diffpress.compress.recipe_text import MAX_VALUES, read_recipe_text, yaml_value
from diffpress.runtime.errors import InvalidInputError


def laughs(levels: int) -> str:
    """Return YAML that aliases expand to 10 ** levels values."""
    lines = ["- &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"- &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, levels)]
    return "\n".join(lines)


def merges(levels: int) -> str:
    """Return YAML whose merge keys copy each other."""
    lines = ["a0: &a0 {x: 1}"]
    return "\n".join(
        [*lines, *(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}], y{n}: 1}}" for n in range(1, levels))]
    )


@pytest.mark.parametrize("text", [laughs(9), merges(12), "seed: &a [*a]", "&a {*a : 1}"])
def test_aliases_that_expand_without_bound_are_refused_immediately(text: str, tmp_path: Path) -> None:
    start = time.monotonic()
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(InvalidInputError, match=rf"r\.yaml: aliases expand it to more than {MAX_VALUES}"):
        read_recipe_text(tmp_path / "r.yaml")
    assert time.monotonic() - start < 10  # without the limit it takes minutes


def test_aliases_and_merge_keys_of_a_moderate_size_are_followed() -> None:
    assert yaml_value(laughs(2))[1][9] == ["x"] * 10
    assert yaml_value("a: &a {x: 1}\nb: {<<: *a, y: 2}")["b"] == {"x": 1, "y": 2}
    assert yaml_value("") is None


@pytest.mark.parametrize("tag", ["python/object/apply:os.abort []", "python/name:os.abort", "python/module:os"])
def test_tags_of_python_are_refused(tag: str, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(f"seed: !!{tag}")
    with pytest.raises(InvalidInputError, match="not valid YAML"):
        Recipe.load(tmp_path / "r.yaml")


def test_a_recipe_that_is_nested_deeply_is_refused(tmp_path: Path) -> None:
    for name, text in (("r.yaml", f"seed: {'[' * 500}{']' * 500}"), ("r.json", "[" * 100_000)):
        (tmp_path / name).write_text(text)
        with pytest.raises(InvalidInputError, match="not valid"):
            Recipe.load(tmp_path / name)
    with pytest.raises(yaml.YAMLError):
        yaml_value("[" * 500 + "]" * 500)


def test_a_recipe_of_a_terabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "r.yaml").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InvalidInputError, match="larger than 128 KiB"):
        Recipe.load(tmp_path / "r.yaml")
