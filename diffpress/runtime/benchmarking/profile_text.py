"""A profile as text: the step, the peaks, tables of operations and of the longest layers, and what is worth doing."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from typing import Any

from diffpress.runtime.benchmarking.advice import LEAST_SHARE, percent

WIDTH = 110
OPERATION_HEAD = ("operation", "ms", "share", "kernels", "on integers", "GFLOP", "MiB", "FLOP/byte", "of peak")
LAYER_HEAD = ("layer", "operation", "runs in", "ms", "share", "GFLOP", "MiB", "FLOP/byte", "GMAC/s", "of peak")


def profile_text(profile: dict[str, Any], top: int) -> str:
    """Return what `diffpress profile` prints; `top` is the number of layers shown."""
    kernels = sum(row["kernels"] for row in profile["layers"])
    lines = [
        f"{profile['component']} of {profile['bundle']['name'] or 'the bundle'} in {profile['engine']}, batch "
        f"{profile['batch']}, {profile['machine']['cores']} cores of {profile['machine']['cpu']}",
        times_text(profile, kernels),
        f"peaks measured here: {peaks_text(profile['peaks'])}",
        *(textwrap.wrap(disturbance_text(profile), WIDTH) if profile["disturbed"] else []),
        "",
        *table([OPERATION_HEAD, *(_operation_cells(row) for row in profile["operations"])]),
        "",
        *table([LAYER_HEAD, *(_layer_cells(row) for row in profile["layers"][:top])]),
        "",
    ]
    if not profile["findings"]:
        lines.append(f"Nothing is worth doing: nothing in the profile could save {LEAST_SHARE:.0%} of the step.")
        return "\n".join(lines)
    lines.append("Worth doing, by what it could save at most:")
    for number, finding in enumerate(profile["findings"], 1):
        share = finding["saves_ms"] / profile["layers_ms" if profile["disturbed"] else "profiled_ms"]
        text = f"{number}. {finding['saves_ms']:.2f} ms ({share:.0%}): {finding['text']}"
        lines += textwrap.wrap(text, WIDTH, subsequent_indent="   ", break_long_words=False)
    return "\n".join(lines)


def times_text(profile: dict[str, Any], kernels: int) -> str:
    """Return the times of the evaluation and of its layers in words."""
    step, profiled, layers = (profile[key] for key in ("step_ms", "profiled_ms", "layers_ms"))
    return (
        f"step {step:.2f} ms, with the profiler {profiled:.2f} ms; its {kernels} kernels take {layers:.2f} ms, "
        f"{layers / profiled:.1%} of the profiled step"
    )


def disturbance_text(profile: dict[str, Any]) -> str:
    """Return in words what shows that other programs were running."""
    usual = profile["profiled_ms"] * (1.0 + profile["noise"])
    taken = profile["preemptions"]
    counted = "" if taken is None else f", and the system took a processor away {taken:.0f} times per evaluation"
    return (
        f"other programs were running: an evaluation took {profile['profiled_ms']:.2f} ms at best and usually "
        f"{usual:.2f}{counted}; its layers are compared with their sum; repeat this on an idle machine"
    )


def peaks_text(peaks: dict[str, Any]) -> str:
    """Return the measured peaks in words."""
    products = ", ".join(f"{kind} {rate:.0f} GMAC/s" for kind, rate in peaks["gmacs"].items())
    copies = ", ".join(f"{rate:.1f} GB/s for {float(mib):g} MiB" for mib, rate in peaks["gb_s"].items())
    return f"{products}; {copies}"


def _operation_cells(row: dict[str, Any]) -> Sequence[str]:
    integer = f"{row['integer_ms'] / row['ms']:.0%}" if row["macs"] and row["ms"] else "-"
    return [row["operation"], f"{row['ms']:.3f}", percent(row["share"]), str(row["kernels"]), integer, *_rates(row)]


def _layer_cells(row: dict[str, Any]) -> Sequence[str]:
    *amounts, of_peak = _rates(row)
    speed = f"{row['gmacs']:.1f}" if row["macs"] and row["gmacs"] else "-"
    cells = [row["name"], row["operation"], row["precision"], f"{row['ms']:.3f}", percent(row["share"])]
    return [*cells, *amounts, speed, of_peak]


def _rates(row: dict[str, Any]) -> list[str]:
    flops = f"{row['flops'] / 1e9:.3f}" if row["flops"] else "-"
    intensity = f"{row['intensity']:.1f}" if row["flops"] and row["intensity"] else "-"
    of_peak = "-" if row["of_peak"] is None or not row["bytes"] else percent(row["of_peak"])
    return [flops, f"{row['bytes'] / 2**20:.2f}", intensity, of_peak]


def table(lines: Sequence[Sequence[str]]) -> list[str]:
    """Return aligned lines with a rule below the head; names are on the left, numbers on the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    names = sum(1 for cell in lines[0] if cell in ("operation", "layer", "runs in"))
    aligned = [
        "  ".join(c.ljust(w) if i < names else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in lines
    ]
    return [aligned[0], "-" * len(aligned[0]), *aligned[1:]]
