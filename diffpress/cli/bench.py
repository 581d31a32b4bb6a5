"""`diffpress bench`: a bundle against its baselines, in one run."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_engine_arguments, chosen_engine, engine_options
from diffpress.runtime.engines.cache import Cache, cache_folder
from diffpress.runtime.errors import plain_warnings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--baseline",
        metavar="CHECKPOINT_OR_BUNDLE",
        action="append",
        default=[],
        help="what to compare with: a checkpoint runs in PyTorch with DDIM-50, a bundle in each engine "
        "by its own plan; may be given twice",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--engine", nargs="+", help="engines to measure, or 'all' that are installed (default: the preferred one)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    add_engine_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    from diffpress.compress.evaluation.bench import bench
    from diffpress.runtime.benchmarking.bench import table
    from diffpress.runtime.io.files import write_json

    # `load_ms` is that of a first load; only an engine that has to be built is taken from where it was kept
    options = engine_options(args, Cache(cache_folder()) if args.rebuild else None)
    with plain_warnings():
        result = bench(
            args.bundle,
            args.baseline,
            batch=args.batch,
            engines=args.engine or [chosen_engine(args)],
            repeats=args.repeats,
            options=options,
        )
    for what, reason in result["left_out"].items():
        print(f"left out: {what}: {reason}")
    print(table(result["rows"]))
    for name, share in result["sampler_overhead"].items():
        print(f"sampler's own time outside {name}: {share:.2%} of a sampling at batch {min(args.batch)}")
    if args.json:
        write_json(args.json, result)
        print(f"written to {args.json}")
    return 0
