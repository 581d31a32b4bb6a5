"""What `compress` and `report` print at the end: the verdict and the figures, in few lines."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from diffpress.compress.report.figures import Figure, figures_of

MAX_LINES = 22  # of the summary; with the paths that the commands print below it, 25
WIDTH = 100


def summary(facts: dict[str, Any]) -> str:
    """Format the verdict and the table that compares the teacher with the bundle, in at most MAX_LINES lines."""
    sentence = textwrap.wrap(facts["verdict"]["sentence"], WIDTH) if "verdict" in facts else []
    above = [*sentence, ""] if sentence else []
    every = figures_of(facts)
    shown = _fitting(every, MAX_LINES - len(above) - 2)  # less the head of the table and its line
    table = _table([("", "teacher", "bundle", "change"), *(figure.cells for figure in shown)])
    if len(shown) < len(every):
        table.append(f"({len(every) - len(shown)} more figures in the report)")
    return "\n".join([*above, *table]).replace("Fréchet", "Frechet")  # as in the logs: a terminal may be ASCII


def _fitting(figures: Sequence[Figure], lines: int) -> list[Figure]:
    """Return as many figures as fit: details are left out first, from the end, then others."""
    if len(figures) <= lines:
        return list(figures)
    by_importance = sorted(range(len(figures)), key=lambda i: (figures[i].is_detail, i))
    kept = set(by_importance[: lines - 1])  # one line says how many are missing
    return [figure for i, figure in enumerate(figures) if i in kept]


def _table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return the aligned rows with a rule below the head."""
    head, *rows = aligned(lines)
    return [head, "-" * len(head), *(row.rstrip() for row in rows)]


def aligned(lines: Sequence[Sequence[str]]) -> list[str]:
    """Align the first column left and the others right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
