"""`diffpress recommend`: measure a model without training, and propose the recipe to start with."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_checkpoint_arguments, loaded
from diffpress.cli.search import ENGINES, preferred_engine
from diffpress.compress.builtin import SELECTION_REFERENCE, TEACHER
from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress recommend my-pipeline --engine openvino --out recipe.yaml"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress recommend`."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--engine", choices=ENGINES, help="engine that formats are timed in (openvino if installed)")
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads of the engine (all)")
    parser.add_argument("--data", type=Path, metavar="DATA", help="training data, as `data` in a recipe")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the recipe to this file")


def run(args: argparse.Namespace) -> int:
    """Print what was measured and the recipe; write it where asked."""
    if args.out is not None and args.out.exists():
        raise InvalidInputError(f"{args.out}: exists already; choose another file with --out")
    if args.data is not None and not args.data.is_file():
        raise InvalidInputError(f"--data {args.data}: does not exist")
    from diffpress.export.search.recommend import recommend
    from diffpress.runtime.io.files import write_text

    data = args.data
    if data is None and args.checkpoint == str(TEACHER):
        data = SELECTION_REFERENCE
    found = recommend(loaded(args), preferred_engine(args.engine), data=data, threads=args.threads)
    print("\n".join([*found.measured, "", found.recipe.rstrip()]))
    if args.out is not None:
        write_text(args.out, found.recipe)
        print(f"\n{args.out}: try it with  diffpress plan {args.checkpoint} --recipe {args.out}")
    return 0
