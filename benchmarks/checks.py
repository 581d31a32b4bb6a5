"""Checks of a benchmark: a measured value against its bound, as a row of the report and as a line of Markdown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def check(what: str, value: float | None, sign: str, bound: float) -> dict[str, Any]:
    """Return {"what", "value", "bound", "passed"}; a value that was not measured (None) fails."""
    holds = value is not None and (value <= bound if sign == "<=" else value >= bound)
    return {"what": what, "value": value, "bound": f"{sign} {bound:.4g}", "passed": holds}


def check_line(row: Mapping[str, Any]) -> str:
    """Return a row of `check` as an item of a Markdown list."""
    value = "not measured" if row["value"] is None else f"{row['value']:.4g}"
    return f"- {'pass' if row['passed'] else 'FAIL'}: {row['what']} {value} ({row['bound']})"
