"""Correctness and speed of TensorRT bundles on an NVIDIA GPU, compared with PyTorch on the same GPU.

    python benchmarks/gpu.py BUNDLE [BUNDLE ...] [--checkpoint CKPT] [--batch 1 8 64] [--budget 90] [--json FILE]

    parity   one evaluation and complete samples from the same noise, in dB against ONNX Runtime on the CPU
    speed    medians over rounds in which all subjects sample in alternation; step time is sampling time / steps
    load     seconds from the bundle to the first output, with an empty cache (the engine is built) and a filled one

A bundle is sampled in two modes. `host` is the Python sampling loop, with a copy to and from the GPU in each step.
`device` is fused sampling (runtime/fused/); the PyTorch subjects use it too (torch_fused.py). A subject that
fails is left out with a one-line reason, and the others are still measured.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from diffpress.runtime.benchmarking.bench import machine, sample_once, sampler_overhead
from diffpress.runtime.benchmarking.timer import alternating_times_ms
from diffpress.runtime.bundle import Bundle, load_bundle
from diffpress.runtime.engines import load_engine, open_engine
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.engines.tensorrt import library as libraries
from diffpress.runtime.engines.tensorrt.engine_files import engine_for
from diffpress.runtime.errors import DiffpressError, EngineUnavailableError
from diffpress.runtime.fused import FUSED_SAMPLERS, fused_only, step_by_step
from diffpress.runtime.network_inputs import dummy_conditioning, dummy_inputs
from diffpress.runtime.sampler import generate
from diffpress.runtime.spec import DenoiserSpec

COMPARED, ROUNDS, COMPILING_S = 4, 5, 10.0
TABLES = ("loads", "compared", "rows")
ONNXRUNTIME, TENSORRT = "onnxruntime", "tensorrt"
MODES = {"host": step_by_step, "device": fused_only}


class Subject(NamedTuple):
    name: str
    mode: str
    network: Any
    spec: DenoiserSpec


@contextmanager
def recorded_errors(what: str, left_out: dict[str, str]) -> Iterator[None]:
    """Record an error of the block as a one-line reason in `left_out` and continue."""
    try:
        yield
    except Exception as error:  # TensorRT, CUDA, torch and the compiler each have their own error types
        left_out[what] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"left out: {what}: {left_out[what]}", flush=True)


def load_twice(bundle: Bundle, folder: Path) -> tuple[Any, dict[str, Any]]:
    """Load a TensorRT engine twice, run it once each time, and return the second with the times of both loads."""
    options, seconds = EngineOptions(rebuild=True, cache=Cache(folder)), []
    for last in (False, True):
        start = time.perf_counter()
        engine = open_engine(bundle, TENSORRT, options=options)
        engine.run(dummy_inputs(engine, bundle.spec_for(TENSORRT), 1))
        seconds.append(time.perf_counter() - start)
        if not last:
            engine.close()
    path = bundle.graph("denoiser", TENSORRT)
    cache = Cache(folder, f"{bundle.hash} {path.relative_to(bundle.path).as_posix()}")
    built, here = bundle.prebuilt_engines("denoiser", TENSORRT), libraries.device_here()
    engine_bytes, entry = engine_for(path, EngineOptions(cache=cache), built, here)
    row = {
        "first_s": seconds[0],
        "second_s": seconds[1],
        "build_s": entry["build_seconds"],
        "plan_bytes": len(engine_bytes),
    }
    return engine, row


def decibels(actual: np.ndarray, expected: np.ndarray, peak: float | None = None) -> float:
    """Return the ratio of signal (or `peak` squared) to squared error, in dB."""
    expected, error = expected.astype(np.float64), actual.astype(np.float64) - expected
    signal = np.mean(expected**2) if peak is None else peak**2
    return float(10 * np.log10(signal / max(np.mean(error**2), 1e-20)))


def compared(bundle: Bundle, engine: Any, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Compare both sampling modes with ONNX Runtime on the CPU, running the same graph."""
    spec, rows = bundle.spec_for(TENSORRT), []
    conditioning, peak = dummy_conditioning(spec, COMPARED), spec.data_range[1] - spec.data_range[0]
    cpu = EngineOptions(providers=("cpu",))
    with closing(load_engine(bundle.graph("denoiser", TENSORRT), ONNXRUNTIME, options=cpu)) as reference:
        inputs = dummy_inputs(engine, spec, COMPARED)
        evaluation_db = decibels(engine.run(inputs), reference.run(inputs))
        expected = generate(reference, spec, range(COMPARED), batch=COMPARED, conditions=conditioning)
        for label, wrap in MODES.items():
            with recorded_errors(f"{bundle.path}, {label}, comparison", left_out):
                actual = generate(wrap(engine), spec, range(COMPARED), batch=COMPARED, conditions=conditioning)
                row = {
                    "sqnr_db": decibels(actual, expected),
                    "psnr_db": decibels(actual, expected, peak),
                    "call_db": evaluation_db,
                }
                rows.append({"name": str(bundle.path), "way": label, **row})
    return rows


def measured(subjects: list[Subject], batch: int, until: float, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Return rows of {name, way, batch, steps, rounds, step_ms, images_s}; no new round starts after `until`."""
    ready: list[Subject] = []
    for subject in subjects:
        with recorded_errors(f"{subject.name}, {subject.mode}, batch {batch}", left_out):
            if subject.mode == "compiled" and until - time.monotonic() < COMPILING_S:
                raise EngineUnavailableError("no time left to compile; give a larger --budget")
            for _ in range(2):  # warm-up: compilation and CUDA graph capture
                sample_once(subject.network, subject.spec, batch)
            ready.append(subject)
    works = [partial(sample_once, subject.network, subject.spec, batch) for subject in ready]
    left_ms = (until - time.monotonic()) * 1e3
    rows = []
    for subject, times in zip(ready, alternating_times_ms(works, 1, max_rounds=ROUNDS, enough_ms=left_ms), strict=True):
        took_ms, steps = statistics.median(times), subject.spec.plan.steps
        row = {"name": subject.name, "way": subject.mode, "batch": batch, "steps": steps, "rounds": len(times)}
        rows.append(row | {"step_ms": took_ms / steps, "images_s": batch / took_ms * 1e3})
    return rows


def gpu() -> str:
    """Return the GPU's name and compute capability.

    Raises:
        DiffpressError: There is no usable GPU.
    """
    cuda = libraries.cuda_runtime()
    capability = libraries.gpu_capability(cuda)
    name = libraries.call(cuda, "cudaGetDeviceProperties", 0).name
    return f"{name.decode() if isinstance(name, bytes) else name}, compute capability {capability}"


def table(rows: list[dict[str, Any]]) -> str:
    """Format rows as a table, with their keys as the header."""
    lines = [list(rows[0]), *(row.values() for row in rows)] if rows else []
    return "\n".join(" ".join(f"{v:12.3f}" if isinstance(v, float) else f"{v!s:>12}" for v in line) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--checkpoint", help="checkpoint that PyTorch runs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no new round starts")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    end, left_out, subjects = time.monotonic() + args.budget, dict[str, str](), list[Subject]()
    try:
        result: dict[str, Any] = {"gpu": gpu(), "machine": machine(), "left_out": left_out}
    except DiffpressError as error:
        print(f"this machine cannot be measured: {error}")
        return 2
    print(result["gpu"], flush=True)
    result |= {key: [] for key in TABLES}
    with TemporaryDirectory() as folder, ExitStack() as stack:
        for path in args.bundles:
            with recorded_errors(f"{path}, tensorrt", left_out):
                bundle = load_bundle(path)
                engine, row = load_twice(bundle, Path(folder))
                stack.enter_context(closing(engine))
                spec = bundle.spec_for(TENSORRT)
                subjects += [Subject(str(path), label, wrap(engine), spec) for label, wrap in MODES.items()]
                share = sampler_overhead(step_by_step(engine), spec, batch=1).share
                result["loads"].append({"name": str(path), **row, "outside_engine": share})
                result["compared"] += compared(bundle, engine, left_out)
            with recorded_errors(f"{path}, onnxruntime with cuda", left_out):
                bundle, cuda = load_bundle(path), EngineOptions(providers=("cuda",))
                engine = stack.enter_context(closing(open_engine(bundle, ONNXRUNTIME, options=cuda)))
                if engine.device != "cuda":
                    raise EngineUnavailableError("this onnxruntime has no working CUDA provider")
                subjects.append(Subject(str(path), "ort cuda", engine, bundle.spec_for(ONNXRUNTIME)))
        with recorded_errors("torch", left_out):
            if args.checkpoint is None:
                raise EngineUnavailableError("--checkpoint is missing")
            from torch_fused import KINDS, TorchFusedSampler

            from diffpress.compress.sources.load import load_checkpoint

            checkpoint = load_checkpoint(args.checkpoint)
            FUSED_SAMPLERS[TorchFusedSampler.name] = TorchFusedSampler.run_fused
            subjects += [Subject("torch", kind, TorchFusedSampler(checkpoint, kind), checkpoint.spec) for kind in KINDS]
        for remaining, batch in zip(range(len(args.batch), 0, -1), args.batch, strict=True):
            with recorded_errors(f"batch {batch}", left_out):
                until = time.monotonic() + (end - time.monotonic()) / remaining
                result["rows"] += measured(subjects, batch, until, left_out)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n\n".join(table(result[key]) for key in TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
