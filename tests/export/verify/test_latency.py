"""export/verify/latency.py: int8 against float in each engine: timing, message and decision."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.compress.checkpoint import Checkpoint, Quantization
from diffpress.compress.config import ExportConfig
from diffpress.export.denoiser import lower_denoiser
from diffpress.export.graph.model import Graph
from diffpress.export.verify.latency import Latency, alternating_latency_ms, measure_latency, slower_engines
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import available


class Sleeper:
    """Engine whose evaluations take known times in turn."""

    def __init__(self, *milliseconds: float) -> None:
        self.milliseconds = milliseconds
        self.calls: list[float] = []

    def run(self, inputs: dict[str, np.ndarray]) -> None:
        self.calls.append(time.perf_counter())
        time.sleep(self.milliseconds[len(self.calls) % len(self.milliseconds)] / 1e3)


def test_engines_alternate_and_medians_are_compared() -> None:
    one, other = Sleeper(2.0, 2.0, 30.0), Sleeper(8.0)
    engines: Any = (one, other)  # only their method `run` is called
    first, second = alternating_latency_ms(engines, {})
    assert 2.0 <= first < 8.0 <= second < 30.0  # a mean of the first would be above 11
    assert len(one.calls) == len(other.calls) >= 6
    assert sorted(one.calls + other.calls) == [
        call for pair in zip(one.calls, other.calls, strict=True) for call in pair
    ]


@pytest.mark.parametrize(
    ("quantized_ms", "verdict"),
    [
        (10.9, "int8 is 1.09x of fp32 in openvino: slower"),
        (10.1, "no gain"),
        (4.8, "int8 is 0.48x of fp32 in openvino: faster"),
    ],
)
def test_the_message_states_the_verdict(quantized_ms: float, verdict: str) -> None:
    latency = Latency("openvino", "int8", 10.0, quantized_ms)
    assert verdict in str(latency) and latency.slower == (quantized_ms > 10.2)


def test_every_engine_is_timed_on_the_graph_it_would_run(
    wide: Checkpoint, wide_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    checkpoint = wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))
    denoiser = lower_denoiser(checkpoint, ExportConfig(), wide_graph)
    found = measure_latency(denoiser, available(), threads=1)
    assert [latency.engine for latency in found] == available()
    assert all(0.05 < latency.latency_ratio < 20 and latency.float_ms > 0 for latency in found)


def test_a_large_model_is_not_timed_and_this_is_reported(
    wide: Checkpoint,
    wide_graph: Graph,
    scales: Callable[..., Quantization],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert measure_latency(lower_denoiser(wide, ExportConfig(), wide_graph), ["onnxruntime"]) == []
    assert not caplog.text  # there is nothing to compare
    monkeypatch.setattr("diffpress.export.verify.latency.is_large", lambda model: True)
    denoiser = lower_denoiser(wide.evolve(quantization=scales(wide)), ExportConfig(), wide_graph)
    assert measure_latency(denoiser, ["onnxruntime"]) == []
    assert "latency not measured" in caplog.text


def test_only_engines_that_are_slower_run_the_float_graph(
    wide: Checkpoint, wide_graph: Graph, scales: Callable[..., Quantization]
) -> None:
    latencies = [Latency("openvino", "int8", 10.0, 6.0), Latency("onnxruntime", "int8", 10.0, 12.0)]
    assert slower_engines(latencies) == ["onnxruntime"] and slower_engines(latencies[:1]) == []
    denoiser = lower_denoiser(wide.evolve(quantization=scales(wide)), ExportConfig(), wide_graph)
    run = denoiser.reverted(slower_engines(latencies)).graph_for("onnxruntime")
    assert run.graph is wide_graph and run.quantization is None
    assert denoiser.reverted(slower_engines(latencies)).graph_for("openvino") is denoiser.portable
    assert denoiser.reverted([]) is denoiser


@pytest.mark.parametrize("revert", [True, False])
def test_export_reports_slower_engines_and_reverts_them_on_request(
    revert: bool,
    wide: Checkpoint,
    wide_graph: Graph,
    scales: Callable[..., Quantization],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tests.cli.test_export import run

    checkpoint = wide.evolve(quantization=scales(wide, weight_range=127 / 64, outputs=True))
    slow = [Latency("onnxruntime", "int8", 10.0, 12.0)]
    monkeypatch.setattr("diffpress.cli.export.loaded", lambda args, dtype: checkpoint)
    monkeypatch.setattr("diffpress.export.denoiser.to_onnx", lambda *_: wide_graph)
    monkeypatch.setattr("diffpress.export.bundle.measure_latency", lambda *arguments: slow)
    flags = ("--revert-slower",) if revert else ()
    assert run("any", "--out", str(tmp_path / "bundle"), "--threads", "1", *flags) == 0
    assert "int8 is 1.20x of fp32 in onnxruntime: slower (12.0 ms against 10.0 ms a step" in caplog.text
    graph_file = load_bundle(tmp_path / "bundle").graph("denoiser", "onnxruntime").name
    assert graph_file == ("denoiser.float.onnx" if revert else "denoiser.onnx")
