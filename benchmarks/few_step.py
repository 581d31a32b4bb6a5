"""Fréchet distance of every solver and timestep spacing at 3 to 10 network evaluations, on the built-in teacher.

    python benchmarks/few_step.py solvers [--steps 3 4 5 6 8 10] [--only TEXT ...] [--samples 2000] [--seeds 3]
                                          [--refine 6] [--engine E] [--precision bf16] [--work DIR] [--json FILE]

    NFE       network evaluations per image, without guidance
    Frechet   distance of the samples to Fashion-MNIST's test images in the built-in features: mean and sd over seeds

Searched timesteps are measured for the solvers that add no noise. Samples come from the fastest installed engine, or
from PyTorch with `--engine torch`, on a GPU if there is one. Each row is written to --json when it is done and is not
measured again, so a killed run resumes and rows can be added later. Needs diffpress[compress].
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffpress.runtime.network_inputs import Network
    from diffpress.runtime.sampling_plan import SamplingPlan
    from diffpress.runtime.spec import DenoiserSpec

SOLVERS = ("ddim", "dpmpp_2m", "dpmpp_3m", "unipc_1", "unipc_2", "unipc_3", "deis_2", "deis_3", "ipndm", "plms", "heun")
NOISY = ("euler_ancestral", "dpmpp_2m_sde", "dpmpp_sde", "lcm")
SPACINGS = ("trailing", "logsnr", "karras")
SEARCHED, START = "searched", "trailing"  # the search starts from START
SEARCH = {"search": "gits", "samples": 64, "fine": 60, "batch": 64}
Row = dict[str, Any]


def requested_rows(steps: list[int], only: list[str] | None) -> Iterator[tuple[str, str, int]]:
    """Yield (solver, spacing, evaluations) of every requested row."""
    for evaluations in steps:
        for solver in (*SOLVERS, *NOISY):
            for spacing in SPACINGS if solver in NOISY else (*SPACINGS, SEARCHED):
                if not only or any(text in f"{solver} {spacing} {evaluations}" for text in only):
                    yield solver, spacing, evaluations


def steps_for(solver: str, evaluations: int) -> int:
    """Return the largest number of steps within this number of evaluations; 0 if there is none."""
    from diffpress.runtime.solvers import solver_evaluations

    return max((n for n in range(1, evaluations + 1) if solver_evaluations(solver, n) <= evaluations), default=0)


def plan_of(
    engine: Network, spec: DenoiserSpec, solver: str, spacing: str, steps: int, refine: int
) -> tuple[SamplingPlan, Row]:
    """Return the sampling plan of a row and, for searched timesteps, the record and duration of the search."""
    from diffpress.compress.sampling_schedule.config import ScheduleConfig
    from diffpress.compress.sampling_schedule.search import search
    from diffpress.runtime.carried_settings import with_solver
    from diffpress.runtime.network_inputs import dummy_conditioning
    from diffpress.runtime.timesteps import timesteps_for

    timesteps = timesteps_for(START if spacing == SEARCHED else spacing, steps, spec.schedule)
    plan = replace(with_solver(spec, solver), timesteps=timesteps)
    if spacing != SEARCHED:
        return plan, {}
    config = ScheduleConfig.model_validate({"solver": solver, "steps": steps, "refine": refine, **SEARCH})
    start = time.monotonic()
    found, found_by = search(engine, spec.with_plan(plan), config, dummy_conditioning(spec, config.samples))
    return plan.over(found), {"search_s": round(time.monotonic() - start, 1), **found_by}


def solvers(args: argparse.Namespace) -> None:
    from diffpress.compress.builtin import FEATURES, REFERENCE, TEACHER
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.open_subject import open_subject
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.export.bundle import export_bundle
    from diffpress.runtime.engines import preferred
    from diffpress.runtime.engines.options import EngineOptions
    from diffpress.runtime.io.files import write_json
    from diffpress.runtime.solvers import solver_evaluations

    folder, name = args.work / "teacher", args.engine or preferred()
    if name != "torch" and not (folder / "manifest.json").is_file():
        export_bundle(load_checkpoint(str(TEACHER)), folder)
    options = EngineOptions(precision=args.precision, threads=args.threads)
    subject = open_subject(str(TEACHER if name == "torch" else folder), name, options)
    engine, spec = subject.network, subject.spec
    features = load_features(FEATURES, spec, args.threads)
    reference = load_reference(REFERENCE, features, spec)
    config = EvaluateConfig(samples=args.samples, seeds=args.seeds, batch=args.batch)
    rows: dict[str, Row] = json.loads(args.json.read_text()) if args.json.is_file() else {}
    with closing(subject):
        for solver, spacing, evaluations in requested_rows(args.steps, args.only):
            steps = steps_for(solver, evaluations)
            key = f"{solver} {spacing} {evaluations} calls, {args.samples} x {args.seeds}" + (
                f", refine {args.refine}" if spacing == SEARCHED else ""
            )
            if key in rows or solver_evaluations(solver, steps) != evaluations:
                continue
            plan, search_record = plan_of(engine, spec, solver, spacing, steps, args.refine)
            start = time.monotonic()
            scores = evaluate(subject.with_spec(spec.with_plan(plan)), config, features, reference, what=key)
            rows[key] = {
                "solver": solver,
                "grid": spacing,
                "calls": evaluations,
                "steps": steps,
                "samples": args.samples,
                "seeds": args.seeds,
                "frechet": scores["frechet"],
                "label_accuracy": scores["label_accuracy"],
                "timesteps": list(plan.timesteps),
                "engine": name if name == "torch" else f"{name} {args.precision}",
                "evaluate_s": round(time.monotonic() - start, 1),
                **({"search": search_record} if search_record else {}),
            }
            write_json(args.json, rows)
            print(f"{key}: {_cell(scores['frechet'], 0.0)}, in {rows[key]['engine']}", flush=True)


def show(rows: Mapping[str, Row]) -> None:
    """Print one line per solver and spacing, one column per NFE, the best of each column in bold."""
    cells = {(row["solver"], row["grid"], row["calls"]): row["frechet"] for row in rows.values()}
    columns = sorted({evaluations for *_, evaluations in cells})
    best = {
        column: min(cell["mean"] for (*_, evaluations), cell in cells.items() if evaluations == column)
        for column in columns
    }
    print(f"\n| solver | spacing | {' | '.join(f'{column} NFE' for column in columns)} |")
    print("|---" * (2 + len(columns)) + "|")
    for solver in (*SOLVERS, *NOISY):
        for spacing in (*SPACINGS, SEARCHED):
            found = [cells.get((solver, spacing, column)) for column in columns]
            texts = [_cell(cell, best[column]) for cell, column in zip(found, columns, strict=True)]
            if any(found):
                print(f"| {solver} | {spacing} | {' | '.join(texts)} |", flush=True)


def _cell(frechet: Mapping[str, float] | None, best: float) -> str:
    if frechet is None:
        return " "
    text = f"{frechet['mean']:.3f} ± {frechet['sd']:.3f}"
    return f"**{text}**" if round(frechet["mean"], 3) <= round(best, 3) else text


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["solvers"])
    parser.add_argument("--steps", type=int, nargs="+", default=[3, 4, 5, 6, 8, 10], metavar="NFE")
    parser.add_argument(
        "--only", nargs="*", metavar="TEXT", help="only rows 'SOLVER SPACING NFE' that contain one of these"
    )
    parser.add_argument("--samples", type=int, default=2000)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=50)
    parser.add_argument("--engine", help="openvino, onnxruntime, tensorrt or torch (default: the fastest installed)")
    parser.add_argument("--precision", default="fp32", help="precision of the engine: fp32, bf16 or fp16")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--refine", type=int, default=6, help="refinement rounds of the search")
    parser.add_argument("--work", type=Path, default=Path("build/few_step"), help="folder of the teacher's bundle")
    parser.add_argument("--json", type=Path, default=Path("build/few_step/solvers.json"), metavar="FILE")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    solvers(args)
    rows = json.loads(args.json.read_text())
    show({key: row for key, row in rows.items() if (row["samples"], row["seeds"]) == (args.samples, args.seeds)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
