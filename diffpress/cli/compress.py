"""`diffpress compress`: run a recipe's stages, export the bundle, evaluate it and write the report."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_recipe_arguments, loaded

EXAMPLE = "diffpress compress my-pipeline --recipe int8 --out work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress compress`."""
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for everything the run makes")
    parser.add_argument("--update", action="store_true", help="redo in DIR only what a changed recipe changes")


def run(args: argparse.Namespace) -> int:
    """Run the recipe; the same command again resumes it."""
    from diffpress.compress.recipe import Recipe

    recipe = Recipe.load(args.recipe, args.set)  # a mistake in it is reported before torch is imported
    from diffpress.export.run import run_recipe

    command = ("diffpress", *args.words)
    run_recipe(
        lambda: loaded(args), recipe, args.out, update=args.update, where=str(args.recipe), command=command, show=print
    )
    return 0
