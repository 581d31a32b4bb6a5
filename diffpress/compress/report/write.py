"""Write the report of a run into its folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from diffpress.compress.report.facts import collect
from diffpress.compress.report.figures import figures_of, to_csv
from diffpress.compress.report.page import report_page
from diffpress.compress.workspace import Workspace
from diffpress.runtime.io.files import write_json, write_text


def write_report(folder: Path) -> dict[str, Any]:
    """Write report.json, report.csv and report.html into the folder of a compress run and return the facts.

    Raises:
        InvalidInputError: `folder` is not the folder of a run, or a file of it cannot be read.
    """
    run, facts = Workspace(folder), collect(folder)
    page = report_page(facts, run)
    write_json(run.report_data, facts)
    write_text(run.report_table, to_csv(figures_of(facts)))
    write_text(run.report_page, page)
    return facts
