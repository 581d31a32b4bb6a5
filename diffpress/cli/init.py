"""`diffpress init`: write a built-in recipe to a file, as a start for one's own."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.compress.builtin import built_in_recipes
from diffpress.runtime.errors import InvalidInputError, unknown_name
from diffpress.runtime.io.files import write_text

EXAMPLE = "diffpress init int8 --out my-recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress init`."""
    names = ", ".join(built_in_recipes())
    parser.add_argument("name", nargs="?", default="quick", metavar="NAME", help=f"{names} (quick)")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write it (NAME.yaml)")


def run(args: argparse.Namespace) -> int:
    """Write the recipe; a file that exists is left as it is."""
    built_in = built_in_recipes()
    if args.name not in built_in:
        raise unknown_name("recipe", args.name, built_in)
    out = args.out or Path(f"{args.name}.yaml")
    if out.exists():
        raise InvalidInputError(f"{out}: exists already; choose another file with --out")
    write_text(out, built_in[args.name].read_text(encoding="utf-8"))
    print(f"{out}: edit it, then  diffpress compress CHECKPOINT --recipe {out} --out DIR")
    return 0
