"""TensorRT bundles on an NVIDIA GPU: do they run, are they right, and how fast beside PyTorch on the same GPU.

    python benchmarks/gpu.py BUNDLE [BUNDLE ...] [--checkpoint CKPT] [--batch 1 8 64] [--budget 90] [--json FILE]

    right    one call and whole samples from the same noise, in dB to ONNX Runtime on the processor with the same graph
    fast     medians of rounds in which all subjects sample in turns; a step is a sampling over its number of steps
    load     seconds from the bundle to the first answer, with an empty cache (the plan is built) and with a full one

A bundle is sampled in two ways: `host` is the sampler's own loop, with a copy to and from the GPU in each step; `device`
is fused sampling (runtime/fused/program.py), which PyTorch's samples use too (torch_fused.py). What does not work is left
out with the reason in one line, and hides nothing else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from diffpress.runtime.benchmarking.bench import machine, sample_once, sampler_overhead  # noqa: E402
from diffpress.runtime.bundle import Bundle, load_bundle  # noqa: E402
from diffpress.runtime.engines import load_engine, open_engine  # noqa: E402
from diffpress.runtime.engines.cache import Cache  # noqa: E402
from diffpress.runtime.engines.options import EngineOptions  # noqa: E402
from diffpress.runtime.engines.tensorrt import library as libraries  # noqa: E402
from diffpress.runtime.engines.tensorrt.engine_files import engine_for  # noqa: E402
from diffpress.runtime.errors import DiffpressError, EngineUnavailableError  # noqa: E402
from diffpress.runtime.fused.program import fused_only, step_by_step  # noqa: E402
from diffpress.runtime.network_inputs import dummy_conditioning, dummy_inputs  # noqa: E402
from diffpress.runtime.sampler import generate  # noqa: E402
from diffpress.runtime.spec import DenoiserSpec  # noqa: E402

COMPARED, ROUNDS, COMPILING_S = 4, 5, 10.0
TABLES = ("loads", "compared", "rows")
ONNXRUNTIME, TENSORRT = "onnxruntime", "tensorrt"
WAYS = {"host": step_by_step, "device": fused_only}


class Subject(NamedTuple):
    name: str
    way: str
    network: Any
    spec: DenoiserSpec


@contextmanager
def tried(what: str, left_out: dict[str, str]) -> Iterator[None]:
    """Whatever fails inside is left out, and said in one line."""
    try:
        yield
    except Exception as error:  # of TensorRT, CUDA, torch or the compiler: each has its own
        left_out[what] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(f"left out: {what}: {left_out[what]}", flush=True)


def opened(bundle: Bundle, folder: Path) -> tuple[Any, dict[str, Any]]:
    """A TensorRT engine that has answered once, loaded the second time, and what both loads took."""
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
    built, here = bundle.built("denoiser", TENSORRT), libraries.device_here()
    plan, entry = engine_for(path, EngineOptions(cache=cache), built, here)
    row = {"first_s": seconds[0], "second_s": seconds[1], "build_s": entry["build_seconds"], "plan_bytes": len(plan)}
    return engine, row


def decibels(found: np.ndarray, wanted: np.ndarray, peak: float | None = None) -> float:
    """Signal (or `peak` squared) to error."""
    wanted, error = wanted.astype(np.float64), found.astype(np.float64) - wanted
    signal = np.mean(wanted**2) if peak is None else peak**2
    return float(10 * np.log10(signal / max(np.mean(error**2), 1e-20)))


def compared(bundle: Bundle, engine: Any, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """How near both ways come to ONNX Runtime on the processor."""
    spec, rows = bundle.spec_for(TENSORRT), []
    conditioning, peak = dummy_conditioning(spec, COMPARED), spec.data_range[1] - spec.data_range[0]
    cpu = EngineOptions(providers=("cpu",))
    with closing(load_engine(bundle.graph("denoiser", TENSORRT), ONNXRUNTIME, options=cpu)) as reference:
        inputs = dummy_inputs(engine, spec, COMPARED)
        call = decibels(engine.run(inputs), reference.run(inputs))
        wanted = generate(reference, spec, range(COMPARED), batch=COMPARED, conditions=conditioning)
        for label, way in WAYS.items():
            with tried(f"{bundle.path}, {label}, comparison", left_out):
                found = generate(way(engine), spec, range(COMPARED), batch=COMPARED, conditions=conditioning)
                row = {"sqnr_db": decibels(found, wanted), "psnr_db": decibels(found, wanted, peak), "call_db": call}
                rows.append({"name": str(bundle.path), "way": label, **row})
    return rows


def measured(subjects: list[Subject], batch: int, until: float, left_out: dict[str, str]) -> list[dict[str, Any]]:
    """Rows of {name, way, batch, steps, rounds, step_ms, images_s}; no new round begins after `until`."""
    ready: list[tuple[Subject, list[float]]] = []
    for subject in subjects:
        with tried(f"{subject.name}, {subject.way}, batch {batch}", left_out):
            if subject.way == "compiled" and until - time.monotonic() < COMPILING_S:
                raise EngineUnavailableError("no time left to compile; give a larger --budget")
            for _ in range(2):  # compiles and captures
                sample_once(subject.network, subject.spec, batch)
            ready.append((subject, []))
    for turn in range(ROUNDS):
        for subject, times in ready if not turn or time.monotonic() < until else ():
            start = time.perf_counter()
            sample_once(subject.network, subject.spec, batch)
            times.append(time.perf_counter() - start)
    rows = []
    for (name, way, _, spec), times in ready:
        took = statistics.median(times)
        row = {"name": name, "way": way, "batch": batch, "steps": spec.plan.steps, "rounds": len(times)}
        rows.append(row | {"step_ms": took / spec.plan.steps * 1e3, "images_s": batch / took})
    return rows


def gpu() -> str:
    """The GPU's name; raises what there is to say where there is none."""
    cuda = libraries.cuda_runtime()
    capability = libraries.gpu_capability(cuda)
    name = libraries.call(cuda, "cudaGetDeviceProperties", 0).name
    return f"{name.decode() if isinstance(name, bytes) else name}, compute capability {capability}"


def table(rows: list[dict[str, Any]]) -> str:
    """The rows under their keys."""
    lines = [list(rows[0]), *(row.values() for row in rows)] if rows else []
    return "\n".join(" ".join(f"{v:12.3f}" if isinstance(v, float) else f"{v!s:>12}" for v in line) for line in lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", type=Path, nargs="+", metavar="BUNDLE")
    parser.add_argument("--checkpoint", help="the model that PyTorch runs")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--budget", type=float, default=90.0, help="seconds after which no new round begins")
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
            with tried(f"{path}, tensorrt", left_out):
                bundle = load_bundle(path)
                engine, row = opened(bundle, Path(folder))
                stack.enter_context(closing(engine))
                spec = bundle.spec_for(TENSORRT)
                subjects += [Subject(str(path), label, way(engine), spec) for label, way in WAYS.items()]
                share = sampler_overhead(step_by_step(engine), spec, batch=1, repeats=3)
                result["loads"].append({"name": str(path), **row, "outside_engine": share})
                result["compared"] += compared(bundle, engine, left_out)
            with tried(f"{path}, onnxruntime with cuda", left_out):
                bundle, cuda = load_bundle(path), EngineOptions(providers=("cuda",))
                engine = stack.enter_context(closing(open_engine(bundle, ONNXRUNTIME, options=cuda)))
                if engine.device != "cuda":
                    raise EngineUnavailableError("this onnxruntime has no CUDA provider that works")
                subjects.append(Subject(str(path), "ort cuda", engine, bundle.spec_for(ONNXRUNTIME)))
        with tried("torch", left_out):
            if args.checkpoint is None:
                raise EngineUnavailableError("no --checkpoint was given")
            from torch_fused import KINDS, TorchWalk

            from diffpress.compress.sources.load import load_checkpoint

            checkpoint = load_checkpoint(args.checkpoint)
            subjects += [Subject("torch", kind, TorchWalk(checkpoint, kind), checkpoint.spec) for kind in KINDS]
        for left, batch in zip(range(len(args.batch), 0, -1), args.batch, strict=True):
            with tried(f"batch {batch}", left_out):
                until = time.monotonic() + (end - time.monotonic()) / left
                result["rows"] += measured(subjects, batch, until, left_out)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")
    print("\n\n".join(table(result[key]) for key in TABLES))
    return 0


if __name__ == "__main__":
    sys.exit(main())
