"""runtime/benchmarking/profiling.py and peaks.py: figures of a profile from known times, and peaks of real kernels."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.benchmarking import peak_kernels, peaks, profiling
from diffpress.runtime.benchmarking.peaks import Peaks, measured_peaks
from diffpress.runtime.benchmarking.profiling import RUNS, Times, measure, profile_of
from diffpress.runtime.engines import available
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.executed_layers import CONVERSION, CONVOLUTION, LINEAR, ExecutedLayer
from diffpress.runtime.engines.options import EngineOptions

PEAKS = Peaks({"fp32": 100.0, "int8": 400.0}, {1.0: 50.0, 64.0: 5.0})
FLOAT = ExecutedLayer("conv", CONVOLUTION, "Conv", "fp32", 200_000_000, 1000)
INTEGER = ExecutedLayer("proj", LINEAR, "Gemm", "int8", 400_000_000, 1000)
REORDER = ExecutedLayer("Reorder", CONVERSION, "Reorder", "fp32", 0, 5_000_000)
STEP_SECONDS, LAYER_MS = 0.002, (3.0, 1.0)


class Profiled:
    """An engine whose profiler reports two layers of 3 and 1 ms, with one run in ten that takes a second longer."""

    def __init__(self) -> None:
        self.runs: list[float] = []

    def run(self, inputs: object) -> None:
        time.sleep(STEP_SECONDS)

    def profiler(self, inputs: object) -> Profiled:
        self.profiled = _Profiler()
        return self.profiled  # type: ignore[return-value]


class _Profiler:
    def __init__(self) -> None:
        self.count = 0

    def run(self) -> None:
        self.count += 1
        time.sleep(2 * STEP_SECONDS)

    def finish(self) -> tuple[list[ExecutedLayer], np.ndarray]:
        times = np.tile(LAYER_MS, (self.count, 1))
        times[0] += 50.0  # the warm-up
        times[1 :: RUNS + 1] += 20.0  # the first run after the other instance ran
        times[RUNS + 3] += 1000.0  # a run of the second block that was interrupted
        return [FLOAT, REORDER], np.cumsum(times, axis=0)


def test_a_layer_has_the_median_of_the_blocks_without_the_runs_that_are_not_measured() -> None:
    found = measure(Profiled(), {})  # type: ignore[arg-type]
    assert [ms for _, ms in found.layers] == pytest.approx(LAYER_MS)
    assert found.step_ms >= 1e3 * STEP_SECONDS and found.profiled_ms >= 2e3 * STEP_SECONDS


def test_no_block_starts_after_the_time_is_spent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiling, "ENOUGH_SECONDS", 0.0)
    engine = Profiled()
    with pytest.raises(IndexError):  # its profiler interrupts a run of the second block, which is missing
        measure(engine, {})  # type: ignore[arg-type]
    assert engine.profiled.count == 1 + 1 + RUNS


def test_rates_follow_from_time_macs_and_bytes() -> None:
    again = FLOAT._replace(macs=100_000_000)
    times = Times(9.5, 10.0, ((FLOAT, 4.0), (again, 2.0), (INTEGER, 1.5), (REORDER, 0.5)), 0.0, 0.0)
    profile = profile_of(times, PEAKS)
    assert profile["layers_ms"] == 8.0 and not profile["disturbed"]
    first, second, third = profile["layers"]  # the two convolutions of one name are one row
    assert (first["name"], first["kernels"], first["ms"], first["share"]) == ("conv", 2, 6.0, 0.75)
    assert first["flops"] == 600_000_000 and first["intensity"] == 300_000.0 and first["gmacs"] == 50.0
    assert first["of_peak"] == pytest.approx(0.5)  # 300 M at 100 GMAC/s take 3 ms
    assert second["of_peak"] == pytest.approx(400 / 400 / 1.5)
    assert third["of_peak"] == pytest.approx(5e6 / 50e6 / 0.5)  # 5 MB at 50 GB/s take 0.1 ms
    rows = {row["operation"]: row for row in profile["operations"]}
    assert list(rows) == [CONVOLUTION, LINEAR, CONVERSION]
    assert rows[CONVOLUTION]["integer_ms"] == 0.0 and rows[LINEAR]["integer_ms"] == 1.5
    assert sum(row["share"] for row in rows.values()) == pytest.approx(1.0)


def test_a_kernel_is_bound_by_its_products_or_by_its_bytes() -> None:
    assert PEAKS.bound_ms(FLOAT) == pytest.approx(2.0) and PEAKS.bound_ms(INTEGER) == pytest.approx(1.0)
    assert PEAKS.bound_ms(REORDER) == pytest.approx(0.1)
    assert PEAKS.bound_ms(REORDER._replace(bytes=2**29)) == pytest.approx(2**29 / 5e6)  # beyond the caches
    assert PEAKS.bound_ms(REORDER._replace(bytes=2**10)) == pytest.approx(2**10 / 50e6)
    assert PEAKS.bound_ms(FLOAT._replace(precision="fp16")) == pytest.approx(1000 / 50e6)
    assert Peaks.from_json(PEAKS.to_json()) == PEAKS


@pytest.mark.parametrize(("noise", "taken", "disturbed"), [(0.0, None, False), (0.5, 0.0, True), (0.0, 3.0, True)])
def test_noise_or_preemptions_mark_a_profile_as_disturbed(noise: float, taken: float | None, disturbed: bool) -> None:
    assert profile_of(Times(1.0, 1.0, (), noise, taken), PEAKS)["disturbed"] is disturbed


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_peaks_are_those_of_kernels_that_ran_in_their_type_and_are_measured_once(
    engine: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if engine not in available():
        pytest.skip(f"{engine} is not installed")
    small = {"SIDE": 8, "SIZES": {"fp32": (32, 64, 16)}, "FAST": (32, 64, 16)}
    for name, value in small.items():
        monkeypatch.setattr(peak_kernels, name, value)
    monkeypatch.setattr(peaks, "COPIED_MIB", (0.25, 1.0))
    monkeypatch.setattr(peaks, "PROFILERS", 1)
    timed: list[list[tuple[ExecutedLayer, float]]] = []
    own = peaks._timed

    def noted(*arguments: Any) -> list[tuple[ExecutedLayer, float]]:
        timed.append(own(*arguments))
        return timed[-1]

    monkeypatch.setattr(peaks, "_timed", noted)
    options = EngineOptions(threads=1, cache=Cache(tmp_path))
    found = measured_peaks(engine, options)
    assert {"fp32", "int8"} <= found.gmacs.keys() and min(found.gmacs.values()) > 0.0
    assert list(found.gb_s) == [0.25, 1.0] and min(found.gb_s.values()) > 0.0
    macs = {layer.macs for layers in timed for layer, _ in layers if layer.macs}
    assert macs == {32 * 32 * 64, 8 * 8 * 16 * 16 * 9}
    sizes = {layer.bytes for layers in timed[-2:] for layer, _ in layers if layer.kernel == "Relu"}
    assert engine == "openvino" or sizes == {2**18, 2**20}
    count = len(timed)
    assert measured_peaks(engine, options) == found and len(timed) == count
    assert measured_peaks(engine, options.with_threads(2)) is not found and len(timed) > count


@pytest.mark.parametrize("kind", ["fp32", "int8"])
def test_the_kernels_compute_the_products_that_they_are_counted_as(kind: str) -> None:
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    x = np.random.default_rng(1).integers(-100, 100, (32, 64)).astype(np.float32) * np.float32(0.02)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(peak_kernels, "SIZES", {"fp32": (32, 64, 16)})
        patch.setattr(peak_kernels, "FAST", (32, 64, 16))
        model = onnx.load_from_string(peak_kernels.product_graph(kind)[0])
        onnx.checker.check_model(onnx.load_from_string(peak_kernels.convolution_graph(kind)[0]), full_check=True)
    onnx.checker.check_model(model, full_check=True)
    weight = np.random.default_rng(0).integers(-64, 65, (64, 32), dtype=np.int8).astype(np.float32) * np.float32(0.02)
    expected = x @ weight
    if kind == "int8":  # rounded to uint8 around 128, then relu
        expected = np.maximum(np.clip(np.rint(expected / 0.02), -128, 127) * 0.02, 0.0)
    found: Any = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_allclose(found[0], expected, atol=0.0201)
