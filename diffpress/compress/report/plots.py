"""Plots as inline SVG, drawn by matplotlib: no JavaScript, no network, and colours that follow dark and light.

    the colours that matplotlib writes are replaced by the page's CSS variables, and its fonts by the page's font

Every plot is a function of the report's facts and returns None if it has nothing to show.
"""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffpress.compress.report.tradeoff import Point, Tradeoff

# colour in matplotlib -> CSS variable of templates/style.css, which holds the shown colours
COLORS = {
    "ink": "#010101",
    "muted": "#020202",
    "line": "#030303",
    "teacher": "#040404",
    "baseline": "#050505",
    "bundle": "#060606",
    "page": "#070707",
}
ROLES = {"torch": ("teacher", "s"), "baseline": ("baseline", "D"), "bundle": ("bundle", "o")}
WIDTH, HEIGHT = 4.8, 3.1  # inches; the page scales it
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "diffpress",  # the same facts give the same ids
    "text.parse_math": False,  # a name may hold a $
    "font.size": 11.0,
    "axes.edgecolor": COLORS["line"],
    "axes.labelcolor": COLORS["muted"],
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.facecolor": "none",
    "grid.color": COLORS["line"],
    "grid.linewidth": 0.6,
    "text.color": COLORS["ink"],
    "xtick.color": COLORS["line"],
    "ytick.color": COLORS["line"],
    "xtick.labelcolor": COLORS["muted"],
    "ytick.labelcolor": COLORS["muted"],
    "xtick.minor.size": 3.5,  # as the major ticks, so that all labels stand in one line
    "xtick.minor.pad": 3.5,
    "ytick.minor.size": 3.5,
    "ytick.minor.pad": 3.5,
    "legend.frameon": False,
    "legend.fontsize": 10.0,
    "legend.handletextpad": 0.4,
}
LOG_RANGE = 8.0  # ratio of largest to least value from which an axis is logarithmic
IDENTICAL_DB = 60.0  # an SQNR from here on is shown as this one
SHOWN_SIGNALS, SIGNAL_POINTS = 4, 512


def quality_against_latency(tradeoff: Tradeoff | None) -> Markup | None:
    """Plot Fréchet distance over milliseconds per image, with error bars; what was only timed is a vertical line."""
    if tradeoff is None or not any(point.quality is not None for point in tradeoff.points):
        return None
    with plot("quality-latency") as (axes, finished):
        for point in tradeoff.points:
            _draw_point(axes, point)
        axes.axhline(tradeoff.floor, color=COLORS["muted"], linestyle=":", linewidth=1, label="real images")
        axes.set_xlabel(f"ms per image, batch {tradeoff.batch}")
        axes.set_ylabel("Fréchet distance")
        _from_zero(axes, [tradeoff])
        _scale(axes.set_xscale, axes.xaxis, [point.ms for point in tradeoff.points])
        legend(axes)
    return finished[0]


def _draw_point(axes: Axes, point: Point, number: int | None = None) -> None:
    color, marker = ROLES[point.role]
    label = point.label if number is None else None
    if point.quality is None:
        axes.axvline(
            point.ms, color=COLORS[color], linestyle="--", linewidth=1, label=label and f"{label} (not scored)"
        )
        return
    axes.errorbar(
        point.ms,
        point.quality,
        yerr=point.sd,
        color=COLORS[color],
        marker=marker,
        markersize=8 if number is None else 13,
        capsize=3,
        linestyle="none",
        label=label,
    )
    if number is not None:
        _numbered(axes, point.ms, point.quality, number)


def stages(lineage: dict[str, Any]) -> Markup | None:
    """Plot the SQNR to the teacher and the MACs of an image after every stage, from the checkpoint (0) on."""
    made = [stage for stage in lineage["stages"] if stage["teacher_sqnr_db"] is not None]
    if not made:
        return None
    numbers = [0, *(stage["number"] for stage in made)]
    values = [IDENTICAL_DB, *(min(stage["teacher_sqnr_db"], IDENTICAL_DB) for stage in made)]
    costs = [(made[0]["macs"][0], made[0]["plan"][0]), *((stage["macs"][1], stage["plan"][1]) for stage in made)]
    macs = [count * _steps(plan) / 1e9 for count, plan in costs]
    with plot("stages", rows=2) as (above, finished):
        below = above.figure.axes[1]
        above.plot(numbers, values, color=COLORS["bundle"], marker="o", markersize=6, linewidth=1.4)
        above.set_ylabel("SQNR, dB")
        above.set_ylim(bottom=min(0.0, *values), top=IDENTICAL_DB * 1.08)
        above.set_yticks([0, 20, 40, IDENTICAL_DB], ["0", "20", "40", f"{IDENTICAL_DB:.0f}+"])
        below.bar(numbers, macs, color=COLORS["baseline"], width=0.6)
        below.set_ylabel("10⁹ MACs")
        below.set_xlabel("stage")
        below.set_xticks(numbers)
    return finished[0]


def sampling_plan(facts: dict[str, Any]) -> Markup:
    """Plot the noise schedule with the evaluations of the teacher's and the bundle's sampling plan on it."""
    timesteps, ratios = zip(*facts["schedule"], strict=True)
    with plot("sampling-plan") as (axes, finished):
        axes.plot(timesteps, ratios, color=COLORS["muted"], linewidth=1)
        for name, label, marker, size in (("baseline", "teacher", "|", 11), ("bundle", "bundle", "o", 7)):
            plan = facts[name]["plan"]
            color = "teacher" if name == "baseline" else "bundle"
            x, y = zip(*plan["levels"], strict=True)
            text = f"{label}: {plan['solver']}, {len(plan['timesteps'])} steps"
            axes.plot(x, y, color=COLORS[color], marker=marker, markersize=size, linestyle="none", label=text)
        axes.invert_xaxis()  # sampling runs from noise to data
        axes.set_xlabel("timestep")
        axes.set_ylabel("signal to noise, dB")
        legend(axes)
    return finished[0]


def training_curve(curve: dict[str, Any], number: int) -> Markup:
    """Plot the loss of one training over its steps; the band is the range of neighbouring steps."""
    steps, mean, low, high = (np.array(column) for column in zip(*curve["points"], strict=True))
    with plot(f"training-{number}") as (axes, finished):
        axes.fill_between(steps, low, high, color=COLORS["bundle"], alpha=0.2, linewidth=0)
        axes.plot(steps, mean, color=COLORS["bundle"], linewidth=1.4)
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        if low.min() > 0:
            _scale(axes.set_yscale, axes.yaxis, [float(low.min()), float(high.max())])
    return finished[0]


def signals(teacher: np.ndarray, bundle: np.ndarray) -> list[Markup]:
    """Plot samples [N, ...] that are no pictures: the first values of each pair, one plot per pair."""
    found = []
    for number, (ours, theirs) in enumerate(zip(bundle[:SHOWN_SIGNALS], teacher[:SHOWN_SIGNALS], strict=True)):
        with plot(f"signal-{number}", HEIGHT / 1.5) as (axes, finished):
            axes.plot(theirs.reshape(-1)[:SIGNAL_POINTS], color=COLORS["teacher"], linewidth=1.2, label="teacher")
            axes.plot(ours.reshape(-1)[:SIGNAL_POINTS], color=COLORS["bundle"], linewidth=1.2, label="bundle")
            axes.set_xlabel(f"value of sample {number}")
            legend(axes)
        found.append(finished[0])
    return found


def compared(runs: Mapping[int, Tradeoff]) -> Markup | None:
    """Plot the bundles of several runs by their numbers, beside the subjects that they were measured against."""
    batches = sorted({run.batch for run in runs.values()})
    if not batches:
        return None
    with plot("compared", HEIGHT * 1.2) as (axes, finished):
        for number, run in runs.items():
            for point in run.points:
                _draw_point(axes, point, number)
        axes.axhline(
            min(run.floor for run in runs.values()),
            color=COLORS["muted"],
            linestyle=":",
            linewidth=1,
            label="real images",
        )
        for role, label in (("torch", "PyTorch eager"), ("baseline", "teacher, same engine"), ("bundle", "bundle")):
            if any(point.role == role for run in runs.values() for point in run.points):
                color, marker = ROLES[role]
                axes.plot([], [], color=COLORS[color], marker=marker, linestyle="none", label=label)
        axes.set_xlabel(f"ms per image, batch {', '.join(map(str, batches))}")
        axes.set_ylabel("Fréchet distance")
        _from_zero(axes, runs.values())
        _scale(axes.set_xscale, axes.xaxis, [point.ms for run in runs.values() for point in run.points])
        legend(axes)
    return finished[0]


def _from_zero(axes: Axes, shown: Collection[Tradeoff]) -> None:
    """Let the distances begin at zero and end above the largest, with its error bar and with that of real images."""
    ends = [one.floor for one in shown] + [
        (point.quality or 0.0) + (point.sd or 0.0) for one in shown for point in one.points
    ]
    axes.margins(x=0.1)
    axes.set_ylim(bottom=0, top=1.12 * max(ends))


def _numbered(axes: Axes, x: float, y: float, number: int) -> None:
    axes.annotate(str(number), (x, y), color=COLORS["page"], ha="center", va="center", fontsize=9, fontweight="bold")


def _steps(plan: str) -> int:
    """Return the steps of a history's plan, 'SOLVER-STEPS'."""
    return int(plan.rpartition("-")[2])


def _scale(set_scale: Callable[[str], None], axis: Any, values: Sequence[float]) -> None:
    """Make an axis logarithmic if the values span a wide range, with plain numbers as labels."""
    if min(values) <= 0 or max(values) / min(values) < LOG_RANGE:
        return
    set_scale("log")
    axis.set_major_formatter("{x:g}")
    if max(values) / min(values) < 200:  # few powers of ten: label 2 and 5 as well
        axis.set_minor_locator(mpl.ticker.LogLocator(subs=(2.0, 5.0)))
        axis.set_minor_formatter("{x:g}")


def legend(axes: Axes) -> None:
    """Put the legend above the axes."""
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), borderaxespad=0.0, labelcolor=COLORS["ink"])


@contextmanager
def plot(name: str, height: float = HEIGHT, rows: int = 1) -> Iterator[tuple[Axes, list[Markup]]]:
    """Yield the first of `rows` empty axes above each other, and a list that holds the SVG after the block."""
    finished: list[Markup] = []
    with mpl.rc_context(STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page has fonts that matplotlib lacks
        figure = Figure(figsize=(WIDTH, height))
        axes = figure.subplots(rows, sharex=True, squeeze=False)
        yield axes[0, 0], finished
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True, bbox_inches="tight", metadata={"Date": None})
        finished.append(_inline(text.getvalue(), name))


def _inline(svg: str, name: str) -> Markup:
    """Return an SVG file as an element of a page: own ids, the page's colours and fonts, no metadata."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\sxmlns(:\w+)?="[^"]*"', "", svg)
    svg = re.sub(r'(<svg[^>]*?) width="[^"]*" height="[^"]*"', rf'\1 role="img" aria-label="{name}"', svg, count=1)
    svg = re.sub(r'(\sid="|url\(#|href="#)', rf"\g<1>{name}-", svg).replace("xlink:href", "href")
    svg = re.sub(r"font: [^;\"]*?([\d.]+px)[^;\"]*", r"font-size: \1", svg)
    svg = re.sub(r" ?font-family: [^;\"]*;?", "", svg)
    for role, color in COLORS.items():
        svg = svg.replace(color, f"var(--{role})")
    return Markup(svg)
