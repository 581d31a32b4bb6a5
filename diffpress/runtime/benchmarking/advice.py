"""What is worth doing about the time of a graph: at most MOST findings of a profile, by what they could save.

A finding carries the figures that it follows from. What it could save is an estimate from the same profile:

    conversions, elementwise, ...     ms - the time that their bytes take at the measured bandwidth
    products in float                 ms * (1 - peak of their type / peak of a faster type)
    a slow layer                      ms - its time at the share of the peak that another layer of that type reaches
    between the layers                what the layers do not add up to

A finding that could save less than LEAST_SHARE of the step is left out.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

from diffpress.runtime.engines import executed_layers as layers

MOST = 5
LEAST_SHARE = 0.01
FASTER = 1.2  # ratio of two peaks from which another type is worth naming
SLOW = 0.5  # of the share of the peak that the best layer of the type reaches
SLOW_SHOWN = 2  # layers
MOVING = {  # operations whose time is that of moving bytes
    layers.CONVERSION: "reorders and conversions",
    layers.NORMALIZATION: "normalizations",
    layers.ELEMENTWISE: "elementwise operations",
    layers.OTHER: "other operations",
}
MULTIPLYING = (layers.CONVOLUTION, layers.LINEAR, layers.ATTENTION)

Row = dict[str, Any]


class Finding(NamedTuple):
    """One thing worth doing: what it could save, in ms of one evaluation, and the figures in words."""

    saves_ms: float
    text: str


def findings(profile: dict[str, Any], quantized_layers: Collection[str] = ()) -> list[Finding]:
    """Return what is worth doing, by what it could save.

    Args:
        profile: As returned by profiling.profile_of.
        quantized_layers: Layers that are meant to run on integers.
    """
    # beside other programs a step takes longer than its layers
    total = profile["layers_ms"] if profile["disturbed"] else profile["profiled_ms"]
    rows = profile["layers"]
    found = [
        *_moving(rows, profile["operations"], total),
        *_in_float(rows, profile["peaks"]["gmacs"], quantized_layers, total),
        *_slow(rows, total),
        *_between(profile),
    ]
    worth = [finding for finding in found if finding.saves_ms >= LEAST_SHARE * total]
    return sorted(worth, key=lambda finding: -finding.saves_ms)[:MOST]


def _moving(rows: Sequence[Row], operations: Sequence[Row], total: float) -> Iterator[Finding]:
    """Find operations whose time is that of moving bytes."""
    for row in operations:
        if row["operation"] not in MOVING or row["of_peak"] is None:  # that of a kernel too short for the clock
            continue
        longest = next(one for one in rows if one["operation"] == row["operation"])
        yield Finding(
            row["ms"] - row["bound_ms"],
            f"{MOVING[row['operation']]} take {percent(row['ms'] / total)} of the step: {row['ms']:.2f} ms in "
            f"{row['kernels']} kernel{'s' * (row['kernels'] != 1)}, which move {row['bytes'] / 2**20:.1f} MiB at "
            f"{percent(row['of_peak'])} of the measured bandwidth; the longest is {longest['name']}, "
            f"{longest['ms']:.2f} ms",
        )


def _in_float(
    rows: Sequence[Row], peaks: dict[str, float], quantized_layers: Collection[str], total: float
) -> Iterator[Finding]:
    """Find products that run in a type whose peak another type exceeds, by operation and type."""
    for operation in MULTIPLYING:
        own = [row for row in rows if row["operation"] == operation and row["macs"] and row["precision"] in peaks]
        for kind in dict.fromkeys(row["precision"] for row in own):
            slow = [row for row in own if row["precision"] == kind]
            faster = {name: peak / peaks[kind] for name, peak in peaks.items() if peak >= FASTER * peaks[kind]}
            if not faster:
                continue
            ms, count = sum(row["ms"] for row in slow), len({row["name"] for row in slow})
            fell = [row for row in slow if row["name"] in quantized_layers]
            although = f", {len(fell)} of them although quantized ({fell[0]['name']}, ...)" if fell else ""
            ratios = " and ".join(f"{ratio:.1f} times as many in {name}" for name, ratio in faster.items())
            yield Finding(
                ms * (1.0 - 1.0 / max(faster.values())),
                f"{operation} runs in {kind} in {count} layer{'s' * (count != 1)}{although}: {ms:.2f} ms, "
                f"{percent(ms / total)} of the step, the longest {slow[0]['name']}; this machine does "
                f"{peaks[kind]:.0f} GMAC/s in {kind}, and {ratios}",
            )


def _slow(rows: Sequence[Row], total: float) -> Iterator[Finding]:
    """Find layers that reach a small part of what another one of the same type reaches; the worst SLOW_SHOWN."""
    large = [row for row in rows if row["macs"] and row["ms"] >= LEAST_SHARE * total and row["of_peak"]]
    found = []
    for row in large:
        best = max((one for one in large if one["precision"] == row["precision"]), key=lambda one: one["of_peak"])
        if row["of_peak"] < SLOW * best["of_peak"]:
            text = (
                f"{row['name']}: {row['ms']:.2f} ms at {percent(row['of_peak'])} of its peak in {row['precision']} "
                f"({row['gmacs']:.3g} GMAC/s, {row['intensity']:.3g} FLOP per byte), where {best['name']} reaches "
                f"{percent(best['of_peak'])}"
            )
            found.append(Finding(row["ms"] - row["bound_ms"] / best["of_peak"], text))
    yield from sorted(found, key=lambda finding: -finding.saves_ms)[:SLOW_SHOWN]


def _between(profile: dict[str, Any]) -> Iterator[Finding]:
    """Find time between the layers; beside other programs it would be theirs."""
    gap, kernels = profile["profiled_ms"] - profile["layers_ms"], sum(row["kernels"] for row in profile["layers"])
    if gap > 0.0 and kernels and not profile["disturbed"]:
        yield Finding(
            gap,
            f"{gap:.2f} ms, {percent(gap / profile['profiled_ms'])} of the step, lie between its {kernels} kernels, "
            f"which take {1e3 * profile['layers_ms'] / kernels:.0f} µs each: more images in a batch share them",
        )


def percent(ratio: float) -> str:
    """Return a ratio in percent, with a decimal below 10 %."""
    return f"{ratio:.0%}" if ratio >= 0.0995 else f"{ratio:.1%}"
