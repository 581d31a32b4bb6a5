"""`diffpress plan`: a dry run. What a recipe would do to a checkpoint, without doing it."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

from diffpress.cli.arguments import add_recipe_arguments, loaded

EXAMPLE = "diffpress plan my-pipeline --recipe int8 --set quantize.samples=16"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress plan`."""
    add_recipe_arguments(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write JSON to FILE, or print it")


def run(args: argparse.Namespace) -> int:
    """Print the resolved stages with the sizes before and after."""
    from diffpress.compress.recipe import Recipe

    recipe = Recipe.load(args.recipe, args.set)  # a mistake in it is reported before torch is imported
    from diffpress.compress.dry_run import dry_run
    from diffpress.compress.pipeline import load_teacher
    from diffpress.export.run import check_recipe
    from diffpress.runtime.io.files import write_json

    if args.json == "-":
        logging.getLogger("diffpress").setLevel(logging.WARNING)  # what is printed is JSON
    checkpoint = loaded(args)
    load_teacher(checkpoint, recipe)
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
        if entry["seconds"] is not None:
            print(
                f"     about {_duration(entry['seconds'])} on this machine, peak memory about {entry['peak_mib']:,} MiB"
            )
    return 0


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def _describe_sizes(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "sizes depend on what is measured in the run"
    return f"{sizes['parameters']:,} parameters, {sizes['macs']:,} MACs, {sizes['bytes'] / 2**20:.2f} MiB of weights"
