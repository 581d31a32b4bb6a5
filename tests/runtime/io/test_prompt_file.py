"""runtime/io/prompt_file.py: one prompt per line, in UTF-8."""

from __future__ import annotations

from pathlib import Path

import pytest

from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.io.prompt_file import read_prompt_file


def test_each_line_is_a_prompt_and_empty_lines_are_left_out(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_bytes("\ufeffa cat\r\n\r\n  a café \n漢".encode())
    assert read_prompt_file(tmp_path / "p.txt") == ("a cat", "a café", "漢")


@pytest.mark.parametrize(
    ("content", "problem"),
    [(None, "not readable"), (b"\xff\xfe\xfa", "not readable"), (b" \n\n", "contains no prompts")],
)
def test_a_file_without_readable_prompts_is_refused(content: bytes | None, problem: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "p.txt").write_bytes(content)
    with pytest.raises(InvalidInputError, match=f"p.txt: {problem}"):
        read_prompt_file(tmp_path / "p.txt")


def test_a_file_of_a_terabyte_is_refused_without_reading_it(tmp_path: Path) -> None:
    with (tmp_path / "p.txt").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(InvalidInputError, match="larger than 256 MiB"):
        read_prompt_file(tmp_path / "p.txt")
