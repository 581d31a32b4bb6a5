"""Profiles of a made run (made_run.py), without an engine: profile.json as compress/report/profiles.py writes it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffpress.compress.workspace import Workspace
from diffpress.runtime.benchmarking.advice import findings
from diffpress.runtime.benchmarking.peaks import Peaks
from diffpress.runtime.benchmarking.profiling import Times, profile_of
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines.executed_layers import ATTENTION, CONVERSION, CONVOLUTION, INT8, ExecutedLayer
from tests.compress.report.made_run import KEPT_IN_FLOAT, LAYERS

PEAKS = Peaks({"fp32": 100.0, INT8: 400.0}, {0.5: 50.0, 128.0: 5.0})
MACS, TURN_MS = 10**7, 0.5
FLOAT_MS, INTEGER_MS = 1.0, 0.25


def profile(bundle: Path, rounded: bool, names: tuple[str, ...] = LAYERS) -> dict[str, Any]:
    """Return the profile of a bundle whose layers all have MACS, with a transposition between them."""
    layers = []
    for name in names:
        kind = INT8 if rounded and name != KEPT_IN_FLOAT else "fp32"
        operation = ATTENTION if "attn" in name else CONVOLUTION
        ms = INTEGER_MS if kind == INT8 else FLOAT_MS
        layers.append((ExecutedLayer(name, operation, "Conv", kind, MACS, 10**5), ms))
    if rounded:
        layers.append((ExecutedLayer("turn", CONVERSION, "Transpose", INT8, 0, 10**5), TURN_MS))
    total = sum(ms for _, ms in layers)
    found = profile_of(Times(total, 1.02 * total, tuple(layers), 0.0, 0.0), PEAKS)
    facts = {"bundle": {"name": bundle.name, "hash": load_bundle(bundle).hash}, "engine": "openvino", "batch": 1}
    return {**facts, **found, "findings": [one._asdict() for one in findings(found)]}


def write_profiles(root: Path, names: tuple[str, ...] = LAYERS) -> None:
    """Write profile.json into the folder of a made run."""
    run = Workspace(root)
    found = {"baseline": profile(run.baseline, False, names), "bundle": profile(run.bundle, True, names)}
    run.profile.write_text(json.dumps(found))
