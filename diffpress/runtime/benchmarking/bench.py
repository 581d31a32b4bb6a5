"""Speed as ratios measured in one run: all subjects take turns, and the medians are compared.

    image_ms               median time of sampling one whole batch (one for each stream) / images in it
    step_ms                median time of one step: the network (both guidance halves) and the solver
    speedup_vs_torch       image_ms of the torch subject with the most steps / this image_ms, same batch size
    speedup_vs_same_engine image_ms of this engine's fp32 subject with the most steps / this image_ms
    sampler_overhead       1 - (time of the engine's calls alone) / (time of the whole sampling)

Turns matter: a machine that warms up or is shared slows down whatever runs just then, and in turns that is
shared too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from diffpress.runtime.benchmarking.probe import Probe, probe
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, available
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import Network, dummy_conditioning, dummy_inputs
from diffpress.runtime.pipeline import in_streams
from diffpress.runtime.sampler import network_evaluations, warm_up
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

TORCH, FLOAT, HALVES = "torch", "fp32", ("fp16", "bf16")
INSTRUCTION_SETS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx_vnni",
    "avx512_bf16",
    "amx_int8",
    "asimd",
    "asimddp",
)
PACKAGES = ("numpy", "onnxruntime", "openvino")

# heading of the printed table: (key of the row, digits)
COLUMNS = {
    "name": ("name", 0),
    "engine": ("engine", 0),
    "precision": ("precision", 0),
    "batch": ("batch", 0),
    "steps": ("steps", 0),
    "nfe": ("nfe", 0),
    "step ms": ("step_ms", 2),
    "image ms": ("image_ms", 2),
    "load ms": ("load_ms", 0),
    "MiB": ("size_mib", 2),
    "peak MiB": ("peak_mib", 0),
    "int MACs": ("integer_mac_share", 3),
    "vs torch": ("speedup_vs_torch", 2),
    "vs engine": ("speedup_vs_same_engine", 2),
}


@dataclass(frozen=True)
class Subject:
    """One thing to measure: `sample(batch)` makes that many images, `step(batch)` runs one step of it.

    With `streams`, both run so many batches at the same time. `nfe` counts network evaluations per image, two a step
    under guidance. `probes` holds, by batch size, what loading took in a fresh process; where a batch size is missing,
    its row says null.
    """

    name: str
    engine: str
    precision: str
    steps: int
    nfe: int
    size_mib: float
    integer_mac_share: float | None
    sample: Callable[[int], object]
    step: Callable[[int], object]
    probes: Mapping[int, Probe] = field(default_factory=dict)
    streams: int = 1


def measure(
    subjects: Sequence[Subject],
    batches: Sequence[int] = (1, 8),
    repeats: int = 5,
    baseline: str | None = None,
) -> dict[str, Any]:
    """Measure the subjects in turns; returns {"machine", "baseline", "rows"} as `bench --json` prints it.

    One warm-up and then `repeats` rounds for each batch size. `baseline` names the subject that the report
    leads with (by default the torch one, else the first); raises InvalidInputError for no subjects, batches or
    repeats.
    """
    if not subjects or not batches or min(batches) < 1 or repeats < 1:
        raise InvalidInputError(
            f"bench: {len(subjects)} subjects, batches {list(batches)}, {repeats} repeats; "
            "at least one of each is needed"
        )
    if baseline is None:
        baseline = next((subject.name for subject in subjects if subject.engine == TORCH), subjects[0].name)
    rows = [row for batch in batches for row in _measure_batch(subjects, batch, repeats)]
    return {"machine": machine(), "baseline": baseline, "rows": rows}


def bundle_subject(
    bundle: Bundle,
    engine: Engine,
    *,
    name: str | None = None,
    plan: SamplingPlan | None = None,
    batches: Sequence[int] = (),
    options: EngineOptions | None = None,
) -> Subject:
    """The subject of a bundle in an open engine, sampled with `plan` (the bundle's own by default).

    `batches` are the batch sizes to probe in fresh processes, `options` those that the engine has. `precision` is int8
    where the engine runs most products on integers, else the float type of the graph, or of `options` for a float32
    one; where the engine does not tell, what the file promises.
    """
    spec = bundle.spec_for(engine.name)
    spec = spec if plan is None else spec.with_plan(plan)
    one_step = spec.plan.over(spec.plan.timesteps[:1])
    options = options or EngineOptions()
    share = engine.integer_mac_share(dummy_inputs(engine, spec, batch=max(batches, default=1)))
    return Subject(
        name=name or str(bundle.manifest.get("name") or bundle.path.name),
        engine=engine.name,
        precision=_executed(bundle, engine.name, share, options),
        steps=spec.plan.steps,
        nfe=network_evaluations(spec),
        size_mib=sum(entry["bytes"] for entry in bundle.manifest["files"].values()) / 2**20,
        integer_mac_share=share,
        sample=lambda batch: sample_once(engine, spec, batch, options.streams),
        step=lambda batch: sample_once(engine, spec.with_plan(one_step), batch, options.streams),
        probes={batch: probe(bundle.path, engine.name, batch, options) for batch in batches},
        streams=options.streams,
    )


def _executed(bundle: Bundle, engine: str, integer_mac_share: float | None, options: EngineOptions) -> str:
    graph = bundle.manifest["graphs"]["denoiser"]
    promised = str(graph.get("variants", {}).get(engine, graph).get("precision", FLOAT))
    if integer_mac_share is None or promised in HALVES:
        return promised
    if integer_mac_share > 0.5:
        return "int8"
    return FLOAT if options.precision == "f32" else options.precision


def sample_once(network: Network, spec: DenoiserSpec, batch: int, streams: int = 1) -> np.ndarray:
    """One batch for each stream by the spec's plan under stand-in conditions, to be timed."""
    count = batch * streams
    return np.concatenate(
        list(in_streams(network, spec, range(count), dummy_conditioning(spec, count), batch, streams))
    )


def sampler_overhead(engine: Network, spec: DenoiserSpec, batch: int = 8, repeats: int = 3) -> float:
    """The share of a sampling's time that goes beyond the engine's calls, taken in turns with those calls alone.

    What an engine does in its graph for the sampler counts too (diffpress.runtime.fused.program.Walker). The median of `repeats`
    turns; noise may bring it below zero.
    """
    step_by_step = _Recording(engine)
    sample_once(step_by_step, spec, batch)
    warm_up(engine, spec, batch)
    shares = []
    for _ in range(repeats):
        start = time.perf_counter()
        sample_once(engine, spec, batch)
        sampled = time.perf_counter()
        for inputs in step_by_step.calls:
            engine.run(inputs)
        shares.append(1.0 - (time.perf_counter() - sampled) / (sampled - start))
    return statistics.median(shares)


def machine() -> dict[str, Any]:
    """What the numbers were measured on; a package's version is null where it is not installed."""
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
    fields = dict(line.split(":", 1) for line in reversed(info.splitlines()) if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = set((fields.get("flags") or fields.get("Features") or "").split())
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "instruction_sets": [name for name in INSTRUCTION_SETS if name in flags],
        "engines": available(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES},
    }


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as plain text, one line each, a dash for null."""
    heads = list(COLUMNS)
    cells = [[_cell(row[key], digits) for key, digits in COLUMNS.values()] for row in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    rows_of_text = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(_aligned(line, widths) for line in rows_of_text)


class _Recording:
    """A network that keeps the inputs of its calls, and does not walk by itself."""

    def __init__(self, engine: Network) -> None:
        self._engine, self.inputs, self.calls = engine, engine.inputs, list[dict[str, np.ndarray]]()

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        self.calls.append(inputs)
        return self._engine.run(inputs)


def _measure_batch(subjects: Sequence[Subject], batch: int, repeats: int) -> list[dict[str, Any]]:
    for subject in subjects:
        subject.step(batch)
    times: list[tuple[list[float], list[float]]] = [([], []) for _ in subjects]
    for _ in range(repeats):
        for subject, (steps, samples) in zip(subjects, times, strict=True):
            samples.append(_milliseconds(subject.sample, batch))
            # after its own sampling: a first step finds the caches full of the subject before it
            steps.append(_milliseconds(subject.step, batch))
    image_ms = [
        statistics.median(samples) / (batch * subject.streams)
        for subject, (_, samples) in zip(subjects, times, strict=True)
    ]
    step_ms = [statistics.median(steps) for steps, _ in times]
    return [_row(subjects, index, batch, step_ms[index], image_ms) for index in range(len(subjects))]


def _row(subjects: Sequence[Subject], index: int, batch: int, step_ms: float, image_ms: list[float]) -> dict[str, Any]:
    subject = subjects[index]
    probed = subject.probes.get(batch)
    torch = _slowest_plan(subjects, [i for i, s in enumerate(subjects) if s.engine == TORCH])
    same = [i for i, s in enumerate(subjects) if s.engine == subject.engine and s.precision == FLOAT]
    engine = _slowest_plan(subjects, same)
    return {
        "name": subject.name,
        "engine": subject.engine,
        "precision": subject.precision,
        "batch": batch,
        "steps": subject.steps,
        "nfe": subject.nfe,
        "step_ms": step_ms,
        "image_ms": image_ms[index],
        "load_ms": probed.load_ms if probed else None,
        "size_mib": subject.size_mib,
        "peak_mib": probed.peak_mib if probed else None,
        "integer_mac_share": subject.integer_mac_share,
        "speedup_vs_torch": None if torch is None else image_ms[torch] / image_ms[index],
        "speedup_vs_same_engine": None if engine is None else image_ms[engine] / image_ms[index],
    }


def _slowest_plan(subjects: Sequence[Subject], among: list[int]) -> int | None:
    """The baseline among these subjects: the one with the most network evaluations, the first of equals."""
    return max(among, key=lambda i: subjects[i].nfe, default=None)


def _milliseconds(work: Callable[[int], object], batch: int) -> float:
    start = time.perf_counter()
    work(batch)
    return (time.perf_counter() - start) * 1e3


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Words to the left, numbers to the right."""
    padded = [
        text.ljust(width) if i < 3 else text.rjust(width)
        for i, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
