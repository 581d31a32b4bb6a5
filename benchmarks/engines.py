"""Measure one bundle in every engine: threads, streams, precision, cache, sampler overhead, import time.

    python benchmarks/engines.py BUNDLE [--batch 1 8] [--rounds 5] [--json FILE]

Every figure is the median over rounds in which all subjects run in alternation:

    step        time to sample one batch per stream, divided by steps and images
    psnr        PSNR of 16 images against the same engine with the first options, from the same noise
    load        time from a fresh process to the first output: without a cache, with an empty and with a filled one
    overhead    share of the sampling time at batch 1 spent outside the engine, under the bundle's plan and under a
                plan of 50 steps, where the fixed cost of a sampling run matters little
    imports     import time in a fresh interpreter
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from diffpress.compress.evaluation.metrics import psnr_db
from diffpress.runtime.benchmarking.bench import machine, sample_once, sampler_overhead
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.engines import available, installed, open_engine
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.errors import DiffpressError
from diffpress.runtime.sampling_plan import make_plan

ROOT = Path(__file__).parent.parent

OPTIONS = {
    "1 thread": EngineOptions(threads=1),
    "2 threads": EngineOptions(threads=2),
    "2 threads, 2 streams": EngineOptions(threads=2, streams=2),
    "2 threads, bf16": EngineOptions(threads=2, precision="bf16"),
    "2 threads, fp16": EngineOptions(threads=2, precision="fp16"),
}
PAIRED = 16
MANY_STEPS = 50  # enough for the fixed cost of a sampling run to be negligible
IMPORTS = {
    "import diffpress.runtime": "import diffpress.runtime",
    "from diffpress.runtime import generate, load_bundle, open_engine": (
        "from diffpress.runtime import generate, load_bundle, open_engine"
    ),
}


def steps(bundle: Bundle, batches: list[int], rounds: int) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Measure step time and PSNR for all engines and options.

    Returns:
        Rows of {engine, options, batch, step_ms, least_ms, psnr_db}, and the reason for each combination that could
        not be opened.
    """
    rows, refused = [], dict[str, str]()
    with ExitStack() as stack:
        subjects = []
        for name in installed():
            for label, options in OPTIONS.items():
                try:
                    engine = stack.enter_context(closing(open_engine(bundle, name, options=options)))
                except DiffpressError as error:
                    refused[f"{name}, {label}"] = str(error)
                    continue
                subjects.append((name, label, engine, options.streams, bundle.spec_for(name)))
        images = {(name, label): sample_once(engine, spec, PAIRED) for name, label, engine, _, spec in subjects}
        reference = next(iter(OPTIONS))
        low, high = bundle.spec.data_range
        for batch in batches:
            works = [partial(sample_once, engine, spec, batch, streams) for *_, engine, streams, spec in subjects]
            for work in works:
                work()
            times = alternating_times_ms(works, rounds)
            for (name, label, _, streams, spec), measured in zip(subjects, times, strict=True):
                step_ms = [ms / (batch * streams * spec.plan.steps) for ms in measured]
                row = {"engine": name, "options": label, "batch": batch, "step_ms": statistics.median(step_ms)}
                psnr = psnr_db(images[name, reference], images[name, label], high - low)
                rows.append(row | {"least_ms": min(step_ms), "psnr_db": psnr})
    return rows, refused


LOAD = """
import json, sys, time
start = time.perf_counter()
from diffpress.runtime.bundle import load_bundle
from diffpress.runtime.engines import open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.sampler import warm_up
bundle = load_bundle(sys.argv[1])
__import__(sys.argv[2])
opening = time.perf_counter()
engine = open_engine(bundle, sys.argv[2], options=EngineOptions.from_json(json.loads(sys.argv[4])))
warm_up(engine, bundle.spec_for(engine.name), int(sys.argv[3]))
end = time.perf_counter()
print(json.dumps([(end - start) * 1e3, (end - opening) * 1e3, time.process_time() * 1e3]))
"""


def loads(bundle: Bundle, batch: int, rounds: int) -> list[dict[str, Any]]:
    """Measure loading without a cache, with an empty cache and with a filled one, in alternation.

    Returns:
        Rows of {engine, load, whole_ms, engine_ms, cpu_ms}: milliseconds of the process up to the first output, of
        opening the engine and computing that output, and of processor time.
    """
    rows = []
    for name in available():
        times: dict[str, list[list[float]]] = {"no cache": [], "first": [], "second": []}
        for _ in range(rounds):
            with TemporaryDirectory() as folder:
                for label, measured in times.items():
                    options = EngineOptions(cache=None if label == "no cache" else Cache(Path(folder)))
                    arguments = [str(bundle.path.resolve()), name, str(batch), json.dumps(options.to_json())]
                    run = [sys.executable, "-c", LOAD, *arguments]
                    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, check=True)
                    measured.append(json.loads(done.stdout))
        for label, measured in times.items():
            total, opened, cpu = (statistics.median(column) for column in zip(*measured, strict=True))
            rows.append({"engine": name, "load": label, "whole_ms": total, "engine_ms": opened, "cpu_ms": cpu})
    return rows


def overheads(bundle: Bundle, rounds: int) -> list[dict[str, Any]]:
    """Return rows of {engine, steps, share, noise} under the bundle's plan and, if it accepts others, a long one."""
    rows = []
    for name in available():
        spec = bundle.spec_for(name)
        specs = [spec]
        if not spec.fixed_timesteps:
            specs.append(spec.with_plan(make_plan("dpmpp_2m", MANY_STEPS, spec.schedule, clip=spec.plan.clip)))
        with closing(open_engine(bundle, name)) as engine:
            for spec in specs:
                overhead = sampler_overhead(engine, spec, batch=1, repeats=rounds)
                rows.append({"engine": name, "steps": spec.plan.steps, **overhead._asdict()})
    return rows


def imports(rounds: int) -> dict[str, float]:
    """Return the import times in milliseconds, without the interpreter's own start."""
    found: dict[str, list[float]] = {label: [] for label in IMPORTS}
    for _ in range(rounds):
        for label, code in IMPORTS.items():
            timed = f"import time; a = time.perf_counter(); {code}; print(time.perf_counter() - a)"
            done = subprocess.run([sys.executable, "-c", timed], cwd=ROOT, capture_output=True, text=True, check=True)
            found[label].append(float(done.stdout) * 1e3)
    return {label: statistics.median(times) for label, times in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    bundle = load_bundle(args.bundle)
    rows, refused = steps(bundle, args.batch, args.rounds)
    result: dict[str, Any] = {
        "machine": machine(),
        "steps": rows,
        "refused": refused,
        "loads": loads(bundle, max(args.batch), args.rounds),
        "overheads": overheads(bundle, max(args.rounds, 25)),
        "imports": imports(args.rounds),
    }
    for row in rows:
        print(f"{row['engine']}, {row['options']}, batch {row['batch']}: ", end="")
        print(f"{row['step_ms']:.2f} ms per step and image, {row['psnr_db']:.1f} dB")
    for what, reason in refused.items():
        print(f"refused: {what}: {reason}")
    for row in result["loads"]:
        print(f"{row['engine']}, load, {row['load']}: {row['whole_ms']:.0f} ms, of which engine ", end="")
        print(f"{row['engine_ms']:.0f} ms; processor time {row['cpu_ms']:.0f} ms")
    for row in result["overheads"]:
        print(f"time outside {row['engine']}, batch 1, {row['steps']} steps: {row['share']:.2%} of the sampling time")
    for label, ms in result["imports"].items():
        print(f"{label}: {ms:.0f} ms")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
