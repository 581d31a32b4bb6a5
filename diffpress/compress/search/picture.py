"""search.png: quality against latency of all trials, the front, and the bounds."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from diffpress.compress.search.study import Trial
from diffpress.runtime.io.files import atomic

SIZE_INCHES, DPI = (7.2, 4.6), 120
TRIAL, MEMBER, CHOSEN, BOUND = "#9aa3ad", "#1f6feb", "#d1242f", "#57606a"


def write_picture(file: Path, facts: dict[str, Any], trials: Sequence[Trial]) -> None:
    """Draw the trials as they were selected, and the front as it was rescored."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE_INCHES, dpi=DPI, layout="constrained")
    axes = figure.add_subplot()
    done = [trial.result for trial in trials if not trial.result.failure]
    axes.scatter(
        [result.latency_ratio for result in done],
        [result.quality for result in done],
        color=TRIAL,
        s=18,
        label="trials, in the features that select",
    )
    scored = [member for member in facts["front"] if member["frechet_ratio"] is not None]
    for member in scored:
        color = CHOSEN if member["name"] == facts["chosen"] else MEMBER
        axes.scatter(member["latency_ratio"], member["frechet_ratio"], color=color, s=42)
        axes.annotate(
            member["name"].removeprefix("trial-"),
            (member["latency_ratio"], member["frechet_ratio"]),
            xytext=(5, 4),
            textcoords="offset points",
            fontsize=8,
        )
    if scored:
        axes.scatter([], [], color=MEMBER, s=42, label="front, in the features that report")
        axes.scatter([], [], color=CHOSEN, s=42, label="chosen")
    bounds = facts["bounds"]
    if bounds["max_latency_ratio"] is not None:
        axes.axvline(bounds["max_latency_ratio"], color=BOUND, linestyle=":", linewidth=1)
    if bounds["max_frechet_ratio"] is not None and scored:
        axes.axhline(bounds["max_frechet_ratio"], color=BOUND, linestyle=":", linewidth=1)
    axes.set_xscale("log")
    axes.set_xlabel(f"time of an image / the teacher's ({facts['engine']})")
    axes.set_ylabel("Fréchet distance / the teacher's" if scored else "error against the teacher's samples, dB")
    if scored and max((result.quality for result in done), default=1.0) > 8.0:
        axes.set_yscale("log")
    axes.grid(True, linewidth=0.4, color="#d0d7de")
    axes.legend(frameon=False, fontsize=8)
    with atomic(file) as temporary:
        figure.savefig(temporary, format="png")
