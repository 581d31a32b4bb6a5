"""Plots of the profiles: time by operation before and after, and the layers of the bundle under the machine's roofs."""

from __future__ import annotations

from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes

from diffpress.compress.report.plots import COLORS, HEIGHT, legend, plot
from diffpress.runtime.engines.executed_layers import INT8, OPERATIONS

LARGEST, SMALLEST = 160.0, 14.0  # area of a layer's mark in square points, for the layer that takes longest, and of all


def time_by_operation(profiles: dict[str, Any] | None) -> Markup | None:
    """Plot the ms of each operation in one evaluation of the teacher and of the bundle, as pairs of bars."""
    if profiles is None:
        return None
    ms = {
        name: {row["operation"]: row["ms"] for row in profiles[name]["operations"]} for name in ("baseline", "bundle")
    }
    shown = [operation for operation in OPERATIONS if operation in ms["baseline"] or operation in ms["bundle"]]
    with plot("time-by-operation", HEIGHT * 1.15) as (axes, finished):
        places = np.arange(len(shown))
        for name, label, offset in (("baseline", "teacher", -0.2), ("bundle", "bundle", 0.2)):
            values = [ms[name].get(operation, 0.0) for operation in shown]
            axes.barh(places + offset, values, 0.36, color=COLORS[name], label=f"{label}, {sum(values):.2f} ms")
            for place, value in zip(places + offset, values, strict=True):
                _note(axes, f"{value:.2f}", (value, place), (3, 0), va="center")
        axes.set_yticks(places, shown)
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.margins(x=0.14)
        axes.set_xlabel("ms per evaluation")
        legend(axes)
    return finished[0]


def roofline(profile: dict[str, Any] | None) -> Markup | None:
    """Plot the layers with products: FLOP/s over FLOP per byte, below the measured peaks; areas are times."""
    rows = (
        [] if profile is None else [row for row in profile["layers"] if row["macs"] and row["bytes"] and row["gmacs"]]
    )
    if not rows or profile is None:
        return None
    peaks = {kind: 2.0 * rate for kind, rate in profile["peaks"]["gmacs"].items()}  # GFLOP/s
    bandwidths = [(float(mib), rate) for mib, rate in profile["peaks"]["gb_s"].items()]
    low = min(row["intensity"] for row in rows) / 2.0
    high = 2.0 * max(*(row["intensity"] for row in rows), *(peaks.values()))
    high = min(high, 1e4)
    with plot("roofline", HEIGHT * 1.15) as (axes, finished):
        axes.set_xscale("log")
        axes.set_yscale("log")
        for kind, rate in peaks.items():
            axes.plot([low, high], [rate, rate], color=COLORS["muted"], linewidth=1)
            _note(axes, f"{kind} {rate:.0f}", (high, rate), (0, 2), ha="right")
        top = max([*peaks.values(), *(2.0 * row["gmacs"] for row in rows)])
        for (mib, rate), style in zip((bandwidths[0], bandwidths[-1]), (":", "--"), strict=True):
            end = min(high, top / rate)
            label = f"{rate:.3g} GB/s, copy of {mib:g} MiB"
            axes.plot([low, end], [low * rate, end * rate], color=COLORS["muted"], linestyle=style, label=label)
        longest = max(row["ms"] for row in rows)
        for color, label, is_integer in (("bundle", "on integers", True), ("teacher", "in float or mixed", False)):
            own = [row for row in rows if (row["precision"] == INT8) is is_integer]
            if own:
                axes.scatter(
                    [row["intensity"] for row in own],
                    [2.0 * row["gmacs"] for row in own],
                    [max(SMALLEST, LARGEST * row["ms"] / longest) for row in own],
                    color=COLORS[color],
                    alpha=0.7,
                    linewidths=0,
                    label=f"layers {label}",
                )
        slowest = min(2.0 * row["gmacs"] for row in rows)
        axes.set_ylim(slowest / 2.0, 2.0 * top)
        axes.set_xlim(low, high)
        axes.set_xlabel("FLOP per byte")
        axes.set_ylabel("GFLOP/s")
        axes.xaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.minorticks_off()
        legend(axes)
    return finished[0]


def _note(axes: Axes, text: str, at: tuple[float, float], shift: tuple[int, int], **alignment: Any) -> None:
    """Write a small text beside a point; `shift` is in points."""
    style: dict[str, Any] = {"fontsize": 9, "color": COLORS["muted"], **alignment}
    axes.annotate(text, at, xytext=shift, textcoords="offset points", **style)
