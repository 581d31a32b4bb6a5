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
    from diffpress.compress.report import summary, write_report
    from diffpress.compress.workspace import Workspace

    workspace = Workspace(args.folder)
    print(summary(write_report(workspace.root)))
    compared = workspace.compared()
    if compared is not None:
        print(f"images  {compared}")
    print(f"bundle  {workspace.bundle}")
    print(f"report  {workspace.report_page}")
    return 0
