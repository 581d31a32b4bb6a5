"""runtime/benchmarking/bench.py with a fake clock, and runtime/benchmarking/probe.py in real fresh processes."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffpress.runtime.benchmarking import bench
from diffpress.runtime.benchmarking.probe import Probe, peak_mib, probe
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.fused import FUSED_SAMPLERS
from diffpress.runtime.fused.program import Program
from diffpress.runtime.pipeline import in_streams
from diffpress.runtime.sampler import network_evaluations

ROOT = Path(__file__).parents[3]
ROW_KEYS = [
    "name", "engine", "precision", "batch", "steps", "nfe", "step_ms", "image_ms", "load_ms", "size_mib", "peak_mib",
    "integer_mac_share", "speedup_vs_torch", "speedup_vs_same_engine",
]  # fmt: skip

Report = tuple[dict[str, Any], "Clock"]


class Clock:
    """A fake clock that only the subjects advance."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.log: list[tuple[str, str, int]] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)

    def subject(self, name: str, engine: str, precision: str, steps: int, step_ms: float) -> bench.Subject:
        def work(kind: str, count: int) -> Callable[[int], None]:
            def spend(batch: int) -> None:
                self.log.append((name, kind, batch))
                self.now += count * step_ms * batch / 1e3

            return spend

        return bench.Subject(
            name,
            engine,
            precision,
            steps,
            steps,
            1.5,
            0.0,
            work("sample", steps),
            work("step", 1),
            {8: Probe(120.0, 64.0)},
        )


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> Report:
    clock = Clock(monkeypatch)
    subjects = [
        clock.subject("teacher", "torch", "fp32", 50, 10.0),
        clock.subject("teacher", "openvino", "fp32", 50, 5.0),
        clock.subject("student", "openvino", "fp32", 8, 4.0),
        clock.subject("bundle", "openvino", "int8", 8, 2.0),
        clock.subject("bundle", "onnxruntime", "int8", 8, 2.5),
    ]
    return bench.measure(subjects, batches=(1, 8), repeats=3), clock


def test_rows_have_the_documented_keys_and_round_trip_through_json(report: Report) -> None:
    found = json.loads(json.dumps(report[0]))
    assert list(found) == ["machine", "baseline", "rows"] and found["baseline"] == "teacher"
    assert len(found["rows"]) == 10 and all(list(row) == ROW_KEYS for row in found["rows"])
    assert [row["batch"] for row in found["rows"]] == [1] * 5 + [8] * 5


def test_times_are_medians_per_step_and_per_image(report: Report) -> None:
    bundle = report[0]["rows"][8]
    assert bundle["step_ms"] == pytest.approx(2.0 * 8) and bundle["image_ms"] == pytest.approx(2.0 * 8)
    assert bundle["load_ms"] == 120.0 and bundle["peak_mib"] == 64.0
    assert report[0]["rows"][3]["load_ms"] is None  # no probe for batch size 1


def test_speedups_are_baseline_over_row(report: Report) -> None:
    rows = report[0]["rows"][5:]
    assert [row["speedup_vs_torch"] for row in rows] == pytest.approx([1, 2, 500 / 32, 500 / 16, 500 / 20])
    # the baseline of an engine is its fp32 subject with the most evaluations
    assert [row["speedup_vs_same_engine"] for row in rows[:4]] == pytest.approx([1, 1, 250 / 32, 250 / 16])
    assert rows[4]["speedup_vs_same_engine"] is None


def test_subjects_alternate_after_a_warm_up(report: Report) -> None:
    log = [(name, kind) for name, kind, batch in report[1].log if batch == 8]
    names = ("teacher", "teacher", "student", "bundle", "bundle")
    one_round = [(name, kind) for name in names for kind in ("sample", "step")]
    assert log == one_round[1::2] + one_round * 3


def test_medians_ignore_one_slow_round(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    steady = clock.subject("a", "openvino", "fp32", 4, 1.0)
    pauses = iter([0.0, 5.0, 0.0, 0.0, 0.0])

    def slow_sample(batch: int) -> None:
        steady.sample(batch)
        clock.now += next(pauses)

    row = bench.measure([replace(steady, sample=slow_sample)], batches=[2], repeats=5)["rows"][0]
    assert row["image_ms"] == pytest.approx(4.0) and row["speedup_vs_torch"] is None


@pytest.mark.parametrize("options", [{"subjects": []}, {"batches": []}, {"batches": [0]}, {"repeats": 0}])
def test_nothing_to_measure_raises(monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]) -> None:
    subjects = [Clock(monkeypatch).subject("a", "openvino", "fp32", 4, 1.0)]
    with pytest.raises(InvalidInputError, match="at least one of each"):
        bench.measure(**{"subjects": subjects, **options})


def test_the_table_is_aligned_and_shows_a_dash_for_missing_values(report: Report) -> None:
    lines = bench.table(report[0]["rows"]).splitlines()
    assert len(lines) == 12 and lines[0].split("  ")[0] == "name" and "vs engine" in lines[0]
    assert lines[2].split()[:4] == ["teacher", "torch", "fp32", "1"] and lines[6].split()[-1] == "-"
    assert len({len(line) for line in lines}) == 1


def test_the_machine_is_described() -> None:
    machine = bench.machine()
    assert machine["numpy"] == np.__version__ and machine["cores"] >= 1 and machine["cpu"]
    assert machine["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}")
    assert set(machine["instruction_sets"]) <= set(bench.INSTRUCTION_SETS)


def test_a_bundle_can_be_measured(tiny: Path) -> None:
    bundle = load_bundle(tiny)
    engine = open_engine(bundle, "onnxruntime", threads=1)
    plan = replace(bundle.spec.plan, guidance=2.0)
    subject = bench.bundle_subject(bundle, engine, plan=plan)
    assert (subject.name, subject.engine, subject.precision, subject.steps, subject.nfe) == (
        "tiny",
        "onnxruntime",
        "fp32",
        8,
        16,
    )
    assert subject.size_mib * 2**20 == (tiny / "denoiser.onnx").stat().st_size and subject.probes == {}
    row = bench.measure([subject], batches=[2], repeats=1)["rows"][0]
    assert row["step_ms"] > 0 and row["image_ms"] > 0


@pytest.mark.parametrize(
    ("exported", "share", "requested", "expected"),
    [
        ("int8", 0.9, "fp32", "int8"),
        ("int8", 0.1, "fp32", "fp32"),  # quantized layers ran in float
        ("fp32", 0.0, "bf16", "bf16"),
        ("fp16", 0.0, "fp32", "fp16"),
        ("fp8", None, "fp32", "fp8"),  # the engine does not report precision
    ],
)
def test_the_reported_precision_is_the_executed_one(
    tiny: Path, exported: str, share: float | None, requested: str, expected: str
) -> None:
    bundle = load_bundle(tiny)
    manifest = {"graphs": {"denoiser": bundle.manifest["graphs"]["denoiser"] | {"precision": exported}}}
    options = EngineOptions(precision=requested)
    assert bench._executed(replace(bundle, manifest=manifest), "onnxruntime", share, options) == expected


def test_evaluations_count_both_guidance_halves_unless_the_weight_is_an_input(tiny: Path) -> None:
    spec = load_bundle(tiny).spec
    assert network_evaluations(spec) == 8
    guided = spec.with_plan(replace(spec.plan, guidance=2.0))
    assert network_evaluations(guided) == 16
    assert network_evaluations(replace(guided, conditioning=replace(spec.conditioning, guidance_input=True))) == 8


def test_sampler_overhead_is_the_time_beyond_the_evaluations(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = load_bundle(tiny)
    real = open_engine(bundle, "onnxruntime", threads=1)
    now = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    class SlowNetwork:
        inputs = real.inputs

        def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
            now[0] += 0.099
            return real.run(inputs)

    def slow_streams(*arguments: Any, **options: Any) -> Iterator[Any]:
        yield from in_streams(*arguments, **options)
        now[0] += 0.001 * bundle.spec.plan.steps

    monkeypatch.setattr(bench, "in_streams", slow_streams)
    assert bench.sampler_overhead(SlowNetwork(), bundle.spec, batch=2) == pytest.approx((0.01, 0.0))

    class SlowFusedNetwork(SlowNetwork):
        name = "fused"

    def run_fused(
        engine: Any, program: Program, static_inputs: Mapping[str, np.ndarray], start: np.ndarray
    ) -> np.ndarray:
        now[0] += 0.109 * program.steps
        return start

    monkeypatch.setitem(FUSED_SAMPLERS, "fused", run_fused)
    # 0.11 s per step, of which the evaluation takes 0.099
    assert bench.sampler_overhead(SlowFusedNetwork(), bundle.spec, batch=2) == pytest.approx((0.1, 0.0))


@pytest.mark.parametrize(
    ("share", "noise", "expected"),
    [
        (0.053, 0.004, "5.3% ± 0.4% of the sampling time"),
        (-0.37, 0.05, "below 5.0% of the sampling time, the noise of this run"),
        (0.01, 0.02, "below 3.0% of the sampling time, the noise of this run"),
    ],
)
def test_an_overhead_within_its_noise_is_given_as_a_bound(share: float, noise: float, expected: str) -> None:
    assert str(bench.Overhead(share, noise)) == expected


def test_a_fresh_process_measures_loading_and_memory(tiny: Path) -> None:
    found = probe(tiny, "onnxruntime", batch=2, options=EngineOptions(threads=1))
    assert 1 < found.load_ms < 60_000
    # an interpreter with numpy and an engine, far below one with torch
    assert found.peak_mib is None or 20 < found.peak_mib < 400


def test_the_peak_counts_freed_memory_but_not_the_parent_process() -> None:
    if peak_mib() is None:
        pytest.skip("this system does not report peak memory")
    code = (
        "import diffpress.runtime.benchmarking.probe as p; a = p.peak_mib(); x = b'1' * 2**27; del x; "
        "print(a, p.peak_mib())"
    )
    completed = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    before, after = map(float, completed.stdout.split())
    assert before < 100 and 120 < after - before < 140


def test_a_failed_probe_gives_the_reason(tiny: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="not a bundle"):
        probe(tmp_path, "onnxruntime", batch=1)
    with pytest.raises(InvalidInputError, match="did you mean 'openvino'"):
        probe(tiny, "openvin", batch=1)
