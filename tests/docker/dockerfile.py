"""Dockerfiles as lists of instructions, for tests."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple


class Instruction(NamedTuple):
    """One instruction: its keyword, and the rest with continuation lines joined."""

    keyword: str
    text: str


def instructions(file: Path) -> list[Instruction]:
    """Return the instructions of a Dockerfile in order, without comments."""
    lines = [line for line in file.read_text(encoding="utf-8").splitlines() if not re.match(r"\s*(#|$)", line)]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [
        Instruction(keyword.upper(), text.strip())
        for keyword, _, text in (x.partition(" ") for x in joined.split("\n"))
    ]


def stages(file: Path) -> list[list[Instruction]]:
    """Return the instructions of every stage, each starting with its FROM."""
    found: list[list[Instruction]] = []
    for instruction in instructions(file):
        if instruction.keyword == "FROM":
            found.append([])
        found[-1].append(instruction)
    return found
