"""`diffpress bench`: a bundle against its baselines, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_engine_arguments, add_signature_argument, chosen_engine, engine_options
from diffpress.runtime.engines.cache import Cache, cache_folder

EXAMPLE = "diffpress bench work/bundle --baseline work/baseline --batch 1 8 --json bench.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress bench`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument(
        "--baseline",
        metavar="CHECKPOINT_OR_BUNDLE",
        action="append",
        default=[],
        help="what to compare with; may be repeated: a checkpoint runs in PyTorch with DDIM-50, a bundle in each "
        "engine under its own sampling plan",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8], metavar="B", help="batch sizes (1 8)")
    parser.add_argument(
        "--engine", nargs="+", help="engines to measure, or 'all' that are installed (default: the preferred one)"
    )
    parser.add_argument("--repeats", type=int, default=3, metavar="N", help="alternating rounds (3)")
    add_engine_arguments(parser)
    add_signature_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON")


def run(args: argparse.Namespace) -> int:
    """Measure, print the table, and write JSON if asked."""
    from diffpress.compress.evaluation.bench import bench
    from diffpress.runtime.benchmarking.bench import Overhead, table
    from diffpress.runtime.benchmarking.step_kinds import step_cache_text
    from diffpress.runtime.io.files import write_json

    # `load_ms` is that of a first load, so nothing is cached but TensorRT engines built with --rebuild
    options = engine_options(args, Cache(cache_folder()) if args.rebuild else None)
    result = bench(
        args.bundle,
        args.baseline,
        batch=args.batch,
        engines=args.engine or [chosen_engine(args)],
        repeats=args.repeats,
        options=options,
        public_key=args.public_key,
    )
    for what, reason in result["left_out"].items():
        print(f"left out: {what}: {reason}")
    print(table(result["rows"]))
    for name, overhead in result["sampler_overhead"].items():
        print(f"sampler overhead outside {name}: {Overhead(**overhead)}, batch {min(args.batch)}")
    for name, facts in result.get("step_cache", {}).items():
        print(f"step cache in {name}: {step_cache_text(facts)}, batch {min(args.batch)}")
    if args.json:
        write_json(args.json, result)
        print(f"written to {args.json}")
    return 0
