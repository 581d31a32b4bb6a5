"""Speed ratios measured in one run: all subjects alternate, and their medians are compared.

    image_ms               median time of sampling one batch (one per stream) / number of images
    step_ms                median time of one step: the network (both guidance halves) and the solver
    speedup_vs_torch       image_ms of the torch subject with the most evaluations / this image_ms, same batch size
    speedup_vs_same_engine image_ms of this engine's fp32 subject with the most evaluations / this image_ms
    sampler_overhead       1 - (time of the network evaluations alone) / (time of sampling)

Subjects alternate so that thermal throttling and other load on the machine affect all of them alike.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.benchmarking.probe import Probe, probe
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.bundle import Bundle
from diffpress.runtime.engines import Engine, available
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.network_inputs import Network, dummy_conditioning, dummy_inputs
from diffpress.runtime.pipeline import in_streams
from diffpress.runtime.sampler import network_evaluations, warm_up
from diffpress.runtime.sampling_plan import SamplingPlan
from diffpress.runtime.spec import DenoiserSpec

TORCH, FLOAT, HALF_PRECISIONS = "torch", "fp32", ("fp16", "bf16")
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
MIN_ROUNDS = 3  # a single round says nothing about its noise
PACKAGES = ("numpy", "onnxruntime", "openvino")

# column heading of the printed table -> (key of the row, digits)
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
    """A model to measure: `sample(batch)` samples that many images, `step(batch)` runs one step.

    Both run `streams` batches concurrently. `nfe` is the number of network evaluations per image, two per step under
    guidance. `probes` maps batch sizes to load time and memory in a fresh process; without a probe these are null.
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
    """Measure the subjects alternately: one warm-up, then `repeats` rounds per batch size.

    Args:
        subjects: Models to measure.
        batches: Batch sizes.
        repeats: Rounds whose median is taken.
        baseline: Name of the subject the report leads with; default: the torch subject, else the first.

    Returns:
        {"machine", "baseline", "rows"}, as printed by `bench --json`.

    Raises:
        InvalidInputError: There are no subjects, batches or repeats.
    """
    if not subjects or not batches or min(batches) < 1 or repeats < 1:
        raise InvalidInputError(
            f"bench: {len(subjects)} subjects, batches {list(batches)}, {repeats} repeats; "
            "at least one of each is required"
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
    """Return the subject of a bundle in an open engine.

    The subject's precision is int8 if the engine runs most MACs on integers, else the float type of the graph (of
    `options` for a float32 graph). If the engine reports no precision, it is that of the manifest.

    Args:
        bundle: The opened bundle.
        engine: The engine its denoiser is loaded in.
        name: Name of the subject; default: the bundle's name.
        plan: Sampling plan; default: the bundle's plan.
        batches: Batch sizes to probe in fresh processes.
        options: Options the engine was opened with.
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
    exported = str(graph.get("variants", {}).get(engine, graph).get("precision", FLOAT))
    if integer_mac_share is None or exported in HALF_PRECISIONS:
        return exported
    if integer_mac_share > 0.5:
        return "int8"
    return options.precision


def sample_once(network: Network, spec: DenoiserSpec, batch: int, streams: int = 1) -> np.ndarray:
    """Sample one batch per stream under the spec's sampling plan with dummy conditioning, for timing."""
    count = batch * streams
    return np.concatenate(
        list(in_streams(network, spec, range(count), dummy_conditioning(spec, count), batch, streams))
    )


class Overhead(NamedTuple):
    """Share of sampling time outside the network, and half the range over the rounds that it was measured in."""

    share: float
    noise: float

    def __str__(self) -> str:
        if self.share > self.noise:
            return f"{self.share:.1%} ± {self.noise:.1%} of the sampling time"
        return f"below {max(self.share, 0.0) + self.noise:.1%} of the sampling time, the noise of this run"


def sampler_overhead(engine: Network, spec: DenoiserSpec, batch: int = 8, repeats: int = 3) -> Overhead:
    """Return the share of sampling time not spent in network evaluations, the median of at least MIN_ROUNDS rounds.

    Each round times a sampling run and its network evaluations alone. Solver steps that the engine runs in its graph
    (diffpress.runtime.fused) count as overhead. Timing noise may make the share negative.
    """
    if spec.plan.cache is not None and spec.plan.cache.kind == "features":
        spec = spec.with_plan(spec.plan.without_cache)  # what is recorded are evaluations of the whole network
    recording = RecordingNetwork(engine)
    sample_once(recording, spec, batch)
    warm_up(engine, spec, batch)

    def evaluate() -> None:
        for inputs in recording.feeds:
            engine.run(inputs)

    works = [lambda: sample_once(engine, spec, batch), evaluate]
    sampling, evaluating = alternating_times_ms(works, max(repeats, MIN_ROUNDS))
    shares = [1.0 - part / total for total, part in zip(sampling, evaluating, strict=True)]
    return Overhead(statistics.median(shares), (max(shares) - min(shares)) / 2.0)


def machine() -> dict[str, Any]:
    """Describe the machine of a measurement; the version of a missing package is None."""
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
    """Format the rows as a plain text table, with a dash for None."""
    heads = list(COLUMNS)
    cells = [[_cell(row[key], digits) for key, digits in COLUMNS.values()] for row in rows]
    widths = [max(len(line[i]) for line in [heads, *cells]) for i in range(len(heads))]
    rows_of_text = [heads, ["-" * width for width in widths], *cells]
    return "\n".join(_aligned(line, widths) for line in rows_of_text)


class RecordingNetwork:
    """A network that records the inputs of its evaluations in `feeds`, without support for fused sampling."""

    def __init__(self, engine: Network) -> None:
        self._engine, self.inputs, self.feeds = engine, engine.inputs, list[dict[str, np.ndarray]]()

    def run(self, inputs: dict[str, np.ndarray]) -> np.ndarray:
        """Record the inputs and return the network's output for them."""
        self.feeds.append(inputs)
        return self._engine.run(inputs)


def _measure_batch(subjects: Sequence[Subject], batch: int, repeats: int) -> list[dict[str, Any]]:
    for subject in subjects:
        subject.step(batch)
    # a step is timed after its subject's own sampling, so that the CPU caches are warm
    works = [partial(work, batch) for subject in subjects for work in (subject.sample, subject.step)]
    medians = [statistics.median(times) for times in alternating_times_ms(works, repeats)]
    sample_ms, step_ms = medians[::2], medians[1::2]
    image_ms = [ms / (batch * subject.streams) for ms, subject in zip(sample_ms, subjects, strict=True)]
    return [_row(subjects, index, batch, step_ms[index], image_ms) for index in range(len(subjects))]


def _row(subjects: Sequence[Subject], index: int, batch: int, step_ms: float, image_ms: list[float]) -> dict[str, Any]:
    subject = subjects[index]
    probed = subject.probes.get(batch)
    torch = _most_evaluations(subjects, [i for i, s in enumerate(subjects) if s.engine == TORCH])
    same = [i for i, s in enumerate(subjects) if s.engine == subject.engine and s.precision == FLOAT]
    engine = _most_evaluations(subjects, same)
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


def _most_evaluations(subjects: Sequence[Subject], among: list[int]) -> int | None:
    """Return the index of the baseline: the most network evaluations, the first of equals."""
    return max(among, key=lambda i: subjects[i].nfe, default=None)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    """Align the first three columns left, the numbers right."""
    padded = [
        text.ljust(width) if i < 3 else text.rjust(width)
        for i, (text, width) in enumerate(zip(line, widths, strict=True))
    ]
    return "  ".join(padded).rstrip()


def _cell(value: object, digits: int) -> str:
    if value is None:
        return "-"
    return f"{value:.{digits}f}" if isinstance(value, float) else str(value)
