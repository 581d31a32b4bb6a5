"""`diffpress report`: report.html and report.json of a compress run."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="DIR", help="the --out of a compress run")


def run(args: argparse.Namespace) -> int:
    from diffpress.compress.report import PICTURE, summary, write_report

    facts = write_report(args.folder)
    print(summary(facts))
    print(f"grid    {args.folder / PICTURE}")
    print(f"bundle  {args.folder / 'bundle'}")
    print(f"report  {args.folder / 'report.html'}")
    return 0
