"""`diffpress recipes`: the built-in recipes, one line each."""

from __future__ import annotations

import argparse

from diffpress.compress.builtin import built_in_recipes

EXAMPLE = "diffpress recipes"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress recipes`: none."""


def run(args: argparse.Namespace) -> int:
    """Print the name of each built-in recipe and the first line of its comment."""
    for name, file in built_in_recipes().items():
        first = file.read_text(encoding="utf-8").splitlines()[0]
        print(f"{name:<10} {first.removeprefix('#').strip()}")
    return 0
