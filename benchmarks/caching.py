"""A step cache on the built-in teacher against its plan without a cache, and against its honest rival. One row a run.

    python benchmarks/caching.py --plan own-20 [--engine openvino] [--precision int8] [--kind features] [--speedup 1.8]
                                 [--samples 2000] [--seeds 3] [--rounds 15] [--work DIR] [--json FILE]

    plan       own-20: the teacher's own plan, 20 steps; ddim-50
    image ms   median time of one image in batches of --batch; the three plans alternate
    Frechet    distance of the samples to Fashion-MNIST's test images in the built-in features: mean and sd over seeds
    rival      the searched plan of --rival-solver with as many full evaluations as fit into the cached plan's time

The cache is chosen as the `schedule` stage does, with the engine as the network; kinds features and auto take the time
of a cached step from it. The int8 bundle is calibrated on the trajectory of the plan without a cache, without output
corrections, and runs all three plans. Rows are added to --json. Needs diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from contextlib import closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint
    from diffpress.runtime.engines import Engine
    from diffpress.runtime.sampling_plan import SamplingPlan
    from diffpress.runtime.spec import DenoiserSpec

PLANS = {"own-20": None, "ddim-50": ("ddim", 50)}  # None: the checkpoint's own
SEARCH = {"search": "gits", "fine": 60}
Row = dict[str, Any]


def planned(name: str) -> Checkpoint:
    """Return the built-in teacher with the plan of that name."""
    from diffpress.compress.builtin import TEACHER
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.runtime.requested_plan import requested_plan

    checkpoint, wanted = load_checkpoint(str(TEACHER)), PLANS[name]
    if wanted is None:
        return checkpoint
    plan = requested_plan(checkpoint.spec, wanted[1], wanted[0], None, None)
    return checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))


def bundle_of(name: str, precision: str, work: Path, engine: str, cut: str) -> Path:
    """Return the folder of the teacher's bundle with that plan, which is made if it does not exist.

    With a cut, its graph also returns the features, and it has the cached graph; every step of its plan is full.
    """
    from diffpress.compress.config import ExportConfig
    from diffpress.compress.context import Context
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.quantization.quantize import quantize
    from diffpress.export.bundle import export_bundle
    from diffpress.runtime.caching.step_cache import StepCache

    folder = work / "-".join(filter(None, (name, precision, engine, cut)))
    if not (folder / "manifest.json").is_file():
        checkpoint = planned(name)
        if cut:
            plan = checkpoint.spec.plan
            plan = replace(plan, cache=StepCache("features", ("full",) * plan.steps, cut=cut))
            checkpoint = checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))
        if precision == "int8":
            context = Context(0, work / f"calibration-{name}", checkpoint)
            checkpoint = quantize(checkpoint, QuantizeConfig(output_correction=False), context)
        export_bundle(checkpoint, folder, ExportConfig(targets=("openvino",) if engine == "openvino" else ("onnx",)))
    return folder


def rival_of(engine: Engine, spec: DenoiserSpec, solver: str, steps: int, samples: int) -> SamplingPlan:
    """Return the plan of this solver over `steps` timesteps, searched on that many trajectories."""
    from diffpress.compress.sampling_schedule.config import ScheduleConfig
    from diffpress.compress.sampling_schedule.search import search
    from diffpress.runtime.network_inputs import dummy_conditioning
    from diffpress.runtime.requested_plan import requested_plan

    config = ScheduleConfig.model_validate({"solver": solver, "steps": steps, "samples": samples, **SEARCH})
    plan = requested_plan(spec, steps, solver, None, None)
    found, _ = search(engine, spec.with_plan(plan), config, dummy_conditioning(spec, config.samples))
    return plan.over(found)


def cached_cost(engine: Engine, spec: DenoiserSpec, cut: str, batch: int, rounds: int) -> float:
    """Return the time of a cached step divided by that of a full one."""
    from diffpress.runtime.benchmarking.step_kinds import step_cache_facts
    from diffpress.runtime.caching.step_cache import StepCache

    steps = ("full", "cached") * spec.plan.steps
    plan = replace(spec.plan, cache=StepCache("features", steps[: spec.plan.steps], cut=cut))
    facts = step_cache_facts(engine, spec.with_plan(plan), batch, rounds)
    assert facts is not None
    return float(facts["ms"]["cached"] / facts["ms"]["full"])


def image_ms(engine: Engine, specs: list[DenoiserSpec], batch: int, rounds: int) -> list[float]:
    """Return the median milliseconds of one image under each spec's plan; the plans alternate."""
    from diffpress.runtime.benchmarking.bench import sample_once
    from diffpress.runtime.benchmarking.timer import alternating_times_ms

    works = [partial(sample_once, engine, spec, batch) for spec in specs]
    for work in works:
        work()
    return [statistics.median(times) / batch for times in alternating_times_ms(works, rounds)]


def measured(args: argparse.Namespace) -> Row:
    """Choose the cache, measure the three plans, and return the row."""
    from diffpress.compress.builtin import FEATURES, REFERENCE
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.open_subject import open_subject
    from diffpress.compress.models.adapter import cut_name
    from diffpress.compress.sampling_schedule.config import StepCacheConfig
    from diffpress.compress.sampling_schedule.step_cache import choose_step_cache
    from diffpress.runtime.engines.options import EngineOptions
    from diffpress.runtime.network_inputs import dummy_conditioning
    from diffpress.runtime.requested_plan import requested_plan

    cut = "" if args.kind == "forecast" else cut_name(planned(args.plan).model, args.cut or "")
    folder = bundle_of(args.plan, args.precision, args.work, args.engine, cut)
    with closing(open_subject(str(folder), args.engine, EngineOptions(threads=args.threads))) as subject:
        engine: Any = subject.network  # of a bundle: an engine
        spec = subject.spec.with_plan(subject.spec.plan.without_cache)
        config = StepCacheConfig(
            kind=args.kind, speedup=args.speedup, samples=args.search_samples, refine=args.search_rounds
        )
        cache, notes = choose_step_cache(
            engine,
            spec,
            config,
            dummy_conditioning(spec, config.samples),
            lambda steps: requested_plan(spec, steps, None, None, None),
            cut=cut,
            cached_cost=cached_cost(engine, spec, cut, args.batch, args.rounds) if cut else 1.0,
        )
        row: Row = {
            **{key: getattr(args, key) for key in ("plan", "engine", "precision", "kind", "speedup")},
            **{key: getattr(args, key) for key in ("samples", "seeds", "rounds", "batch")},
            "cache": notes,
        }
        if cache is None:
            return row
        cached = spec.with_plan(replace(spec.plan, cache=cache))
        whole_ms, cached_ms = image_ms(engine, [spec, cached], args.batch, args.rounds)
        steps = max(1, int(cached_ms / whole_ms * spec.plan.steps))
        rival = spec.with_plan(rival_of(engine, spec, args.rival_solver, steps, args.search_samples))
        specs = {"whole": spec, "cached": cached, "rival": rival}
        times = image_ms(engine, list(specs.values()), args.batch, args.rounds)
        features = load_features(FEATURES, spec, args.threads)
        reference = load_reference(REFERENCE, features, spec)
        scoring = EvaluateConfig(samples=args.samples, seeds=args.seeds, batch=args.batch)
        for (name, one), ms in zip(specs.items(), times, strict=True):
            scores = evaluate(subject.with_spec(one), scoring, features, reference, what=name)
            row[name] = {
                "steps": one.plan.steps,
                "solver": one.plan.solver,
                "image_ms": round(ms, 3),
                "frechet": scores["frechet"],
            }
        row["cached"]["evaluates"] = list(cache.steps)
    return row


def text(row: Row) -> str:
    """Return the row as a line of a Markdown table."""
    kind = row["cache"].get("kind", row["kind"])  # auto has chosen one
    start = f"| {row['plan']} | {row['engine']} | {row['precision']} | {kind} {row['speedup']:g}x |"
    if "cached" not in row:
        return f"{start} nothing gained |"
    whole, cached, rival = (row[name] for name in ("whole", "cached", "rival"))
    distances = [
        f"{one['frechet']['mean']:.4f}" + ("" if one["frechet"]["sd"] is None else f" ± {one['frechet']['sd']:.4f}")
        for one in (whole, cached, rival)
    ]
    ms = [f"{one['image_ms']:.2f}" for one in (whole, cached, rival)]
    gain = whole["image_ms"] / cached["image_ms"]
    ratio = cached["frechet"]["mean"] / whole["frechet"]["mean"]
    return (
        f"{start} {' | '.join(ms)} | {gain:.2f}x | {' | '.join(distances)} | {ratio:.3f} | "
        f"{rival['solver']} {rival['steps']} |"
    )


HEAD = (
    "| plan | engine | precision | cache | whole, image ms | cached, ms | rival, ms | faster | whole, Frechet | "
    "cached | rival | cached / whole | rival's plan |"
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="own-20")
    parser.add_argument("--engine", choices=("openvino", "onnxruntime"), default="openvino")
    parser.add_argument("--precision", choices=("fp32", "int8"), default="fp32")
    parser.add_argument("--kind", choices=("forecast", "features", "auto"), default="forecast")
    parser.add_argument("--cut", help="where kinds features and auto split the network (the outermost)")
    parser.add_argument("--speedup", type=float, default=1.8)
    parser.add_argument("--rival-solver", default="unipc_2")
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15, help="alternating rounds of the times")
    parser.add_argument("--search-samples", type=int, default=64, help="trajectories of the searches")
    parser.add_argument("--search-rounds", type=int, default=1, help="rounds that refine the cache")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--work", type=Path, default=Path("build/caching"), help="folder of the bundles")
    parser.add_argument("--json", type=Path, default=Path("build/caching/rows.json"), metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    from diffpress.runtime.io.files import write_json

    row = measured(args)
    rows = json.loads(args.json.read_text()) if args.json.is_file() else []
    write_json(args.json, [*rows, row])
    print(f"{HEAD}\n{'|---' * 13}|\n{text(row)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
