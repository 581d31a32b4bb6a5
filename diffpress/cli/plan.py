"""`diffpress plan`: what a recipe would do to a checkpoint, without doing it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffpress.cli.arguments import add_recipe_arguments, loaded


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to FILE or to the screen")


def run(args: argparse.Namespace) -> int:
    from diffpress.compress.dry_run import planned
    from diffpress.compress.recipe import read_recipe
    from diffpress.runtime.io.files import write_json

    recipe = read_recipe(args.recipe, tuple(args.set))
    result = planned(loaded(args), recipe)
    if args.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    if args.json:
        write_json(Path(args.json), result)
    print(f"recipe {args.recipe}, seed {recipe.seed}")
    for number, stage in enumerate(result["stages"]):
        settings = ", ".join(f"{k}={v}" for k, v in stage["config"].items())
        print(f"  {number + 1}. {stage['name']:<9} {settings}")
        print(f"     -> {_sizes_in_words(stage['after'])}")
    print(f"before: {_sizes_in_words(result['before'])}")
    return 0


def _sizes_in_words(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "sizes depend on the importance, measured when it runs"
    return f"{sizes['parameters']:,} parameters, {sizes['macs']:,} MACs, {sizes['bytes'] / 2**20:.2f} MiB of weights"
