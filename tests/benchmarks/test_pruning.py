"""benchmarks/prune_stage.py and pruned_latency.py, on tiny networks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("torch")

import prune_stage
import pruned_latency


def test_the_stage_is_measured_in_time_memory_and_what_remains(tiny_folder: Callable[..., Path]) -> None:
    row = prune_stage.measured(tiny_folder("sd"), {"method": "magnitude", "ratio": 0.5})
    assert 0.3 < float(str(row["params_fraction"])) < 0.9
    assert float(str(row["seconds"])) >= 0 and float(str(row["peak"])) >= float(str(row["peak_loaded"]))


@pytest.mark.slow
def test_every_pruned_network_is_timed_in_every_engine(
    tiny_folder: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine_cost = "diffpress.export.targets.engine_cost"
    monkeypatch.setattr(f"{engine_cost}.alternating_latency_ms", lambda engines, inputs: [2.0, 1.0])
    monkeypatch.setattr("diffpress.compress.pruning.target.BISECTIONS", 1)
    monkeypatch.setattr(pruned_latency, "MACS", 0.99)
    found = pruned_latency.rows(str(tiny_folder("ldm")), ["onnxruntime"], tmp_path)
    names = ["width, macs 0.99", "depth, macs 0.99", "width, latency 0.6 in onnxruntime"]
    assert [row["pruned"] for row in found] == names
    assert all(row["latency"] == 0.5 and row["macs"] < 1 for row in found)
