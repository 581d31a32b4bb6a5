"""The result of a search as text: the table of its front, and what comes nearest if nothing keeps the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from diffpress.compress.report.summary import aligned
from diffpress.compress.search.front import violation
from diffpress.compress.search.settings import Bounds

COLUMNS = ("name", "latency", "faster", "MiB", "Frechet ratio", "bounds", "recipe")
VALUE_OF = {"max_latency_ratio": "latency_ratio", "max_frechet_ratio": "frechet_ratio", "max_size_mib": "size_mib"}


def table(members: Sequence[dict[str, Any]], chosen: str | None) -> str:
    """Return the table of the front, one line per bundle; the chosen one is marked with *."""
    rows = [COLUMNS, *(_row(member, member["name"] == chosen) for member in members)]
    return "\n".join(line.rstrip() for line in aligned(rows))


def _row(member: dict[str, Any], is_chosen: bool) -> tuple[str, ...]:
    ratio = member["frechet_ratio"]
    return (
        f"{member['name']}{' *' if is_chosen else ''}",
        f"{member['latency_ratio']:.3f}",
        f"{1.0 / member['latency_ratio']:.1f}x",
        f"{member['size_mib']:.2f}",
        "-" if ratio is None else f"{ratio:.2f}",
        "kept" if member["meets_bounds"] else "exceeded",
        member["choices"],
    )


def nearest_line(members: Sequence[dict[str, Any]], bounds: Bounds) -> str:
    """Return one line: that nothing keeps the bounds, what comes nearest, and by how much it exceeds which."""
    nearest = min(members, key=lambda member: (violation(member["excesses"]), bool(member["parity_failures"])))
    limits = bounds.model_dump()
    missed = [
        f"{VALUE_OF[name]} is {nearest[VALUE_OF[name]]:.3f}, {name} is {limits[name]:g}"
        for name, excess in nearest["excesses"].items()
        if excess > 0.0
    ]
    missed += nearest["parity_failures"]
    return f"nothing meets the bounds; {nearest['name']} comes nearest: {'; '.join(missed)}"
