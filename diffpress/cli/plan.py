"""`diffpress plan`: a dry run. What a recipe would do to a checkpoint, without doing it."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from diffpress.cli.arguments import add_recipe_arguments, loaded

EXAMPLE = "diffpress plan my-pipeline --recipe int8 --set quantize.samples=16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress plan`."""
    add_recipe_arguments(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or print it")


def run(args: argparse.Namespace) -> int:
    """Print the resolved stages with the sizes before and after."""
    from diffpress.compress.dry_run import dry_run
    from diffpress.compress.recipe import Recipe
    from diffpress.export.run import check_recipe
    from diffpress.runtime.io.files import write_json

    recipe, checkpoint = Recipe.load(args.recipe, args.set), loaded(args)
    check_recipe(recipe, checkpoint, str(args.recipe))
    result = dry_run(checkpoint, recipe)
    if args.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    if args.json:
        write_json(Path(args.json), result)
    print(f"recipe {args.recipe}, seed {recipe.seed} (settings that are not shown have their defaults)")
    print(f"before: {_describe_sizes(result['before'])}")
    for number, (stage, entry) in enumerate(zip(recipe.stages, result["stages"], strict=True)):
        kind = {"kind": stage.config.kind} if hasattr(stage.config, "kind") else {}
        changed = kind | stage.config.model_dump(mode="json", exclude_defaults=True)
        settings = ", ".join(f"{k}={v}" for k, v in changed.items())
        print(f"  {number + 1}. {stage.name:<9} {settings}")
        print(f"     -> {_describe_sizes(entry['after'])}")
    return 0


def _describe_sizes(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "sizes depend on the importance, which is measured in the run"
    return f"{sizes['parameters']:,} parameters, {sizes['macs']:,} MACs, {sizes['bytes'] / 2**20:.2f} MiB of weights"
