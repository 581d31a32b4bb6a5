"""`diffpress schema`: the JSON schema of a recipe, with which editors complete and check one."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

EXAMPLE = "diffpress schema --out recipe.schema.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress schema`."""
    parser.add_argument("--out", type=Path, metavar="FILE", help="write it to FILE instead of printing it")


def run(args: argparse.Namespace) -> int:
    """Print the schema, or write it to a file."""
    from diffpress.compress.recipe_schema import recipe_schema
    from diffpress.runtime.io.files import write_json

    if args.out is None:
        print(json.dumps(recipe_schema(), indent=1))
    else:
        write_json(args.out, recipe_schema())
        print(f"{args.out}: name it in the first line of a recipe,  # yaml-language-server: $schema={args.out}")
    return 0
