"""`diffpress report`: write the report of a compress run again, or compare several runs."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress report work"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress report`."""
    parser.add_argument(
        "folder", type=Path, nargs="+", metavar="DIR", help="the --out of a compress run; several are compared"
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FILE",
        help="web page of the comparison of several runs, with CSV and JSON beside it",
    )


def run(args: argparse.Namespace) -> int:
    """Write the report or the comparison, print its summary and where everything is."""
    if len(args.folder) > 1:
        return _compare(args.folder, args.out)
    if args.out is not None:
        raise InvalidInputError(f"--out {args.out}: the report of one run is written into its folder; leave it out")
    from diffpress.compress.report.profiles import measure_profiles
    from diffpress.compress.report.summary import summary
    from diffpress.compress.report.write import write_report
    from diffpress.compress.workspace import Workspace

    workspace = Workspace(args.folder[0])
    if workspace.recipe.is_file():  # a folder that is none of a run is refused below
        measure_profiles(workspace)
    print(summary(write_report(workspace.root)))
    compared = workspace.compared()
    if compared is not None:
        print(f"images  {compared}")
    print(f"bundle  {workspace.bundle}")
    print(f"report  {workspace.report_page}")
    return 0


def _compare(folders: list[Path], out: Path | None) -> int:
    from diffpress.compress.report.compare import comparison_table, write_comparison

    if out is None:
        raise InvalidInputError(
            f"report: {len(folders)} runs are compared in one file; name it, as in --out compare.html"
        )
    print(comparison_table(write_comparison(folders, out)))
    print(f"report  {out}")
    return 0
