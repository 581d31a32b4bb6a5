"""`diffpress compress`: a recipe's stages, then everything a deployment and a reader want of them."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_recipe_arguments, loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--update", action="store_true", help="redo in DIR what a changed recipe changes")


def run(args: argparse.Namespace) -> int:
    from diffpress.compress.recipe import read_recipe
    from diffpress.export.run import run_recipe

    recipe = read_recipe(args.recipe, tuple(args.set))
    run_recipe(lambda: loaded(args), recipe, args.out, update=args.update, where=str(args.recipe))
    return 0
