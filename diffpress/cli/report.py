"""`diffpress report`: write report.html and report.json of a compress run again."""

from __future__ import annotations

import argparse
from pathlib import Path

EXAMPLE = "diffpress report work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress report`."""
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of a compress run")


def run(args: argparse.Namespace) -> int:
    """Write the report, print its summary and where everything is."""
    from diffpress.compress.report import PICTURE, summary, write_report

    facts = write_report(args.folder)
    print(summary(facts))
    print(f"images  {args.folder / PICTURE}")
    print(f"bundle  {args.folder / 'bundle'}")
    print(f"report  {args.folder / 'report.html'}")
    return 0
