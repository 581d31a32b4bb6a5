"""`diffpress sample`: a bundle and a few wishes in, one PNG grid out."""

from __future__ import annotations

import argparse
import re
import sys
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.bundle import load_bundle
from runtime.conditioning import Conditioning
from runtime.engines import ENGINES, Engine
from runtime.engines.cache import Cache, cache_folder
from runtime.engines.options import PRECISIONS, EngineOptions
from runtime.engines.providers import CPU, PROVIDERS
from runtime.errors import BadInput, plain_warnings
from runtime.images import grid, to_uint8, write_png
from runtime.pipeline import Pipeline, has_fixed_size, resized
from runtime.sampler import MAX_SEED, warm_up
from runtime.schedule import spaced_timesteps
from runtime.solvers import SOLVERS, with_solver
from runtime.spec import DenoiserSpec, Plan

ALIKE = {"ddim", "euler"}  # without fresh noise the same step

def add_sample_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffpress sample`; what is left out follows the bundle's own plan."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument("-n", "--number", type=int, default=16, metavar="N", help="how many images (16)")
    parser.add_argument("--seed", type=int, default=0, help="image i starts from seed + i (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("grid.png"), metavar="PNG", help="where the grid goes (grid.png)"
    )
    wish = parser.add_mutually_exclusive_group()
    wish.add_argument("--label", type=int, metavar="K", help="class of all images (all classes in turn)")
    wish.add_argument("--prompt", metavar="TEXT", help="text, for a model conditioned on text")
    parser.add_argument("--negative", metavar="TEXT", help="what the image should not show; needs guidance above 1")
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, where the model allows others")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--solver", metavar="S", help=", ".join(SOLVERS))
    parser.add_argument(
        "--grid", metavar="G", help="spacing of the steps: leading, trailing, linspace, quad, karras, ..."
    )
    parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance weight, 1 is off")
    parser.add_argument("--engine", metavar="E", help=f"{', '.join(ENGINES)} (the first of these that can run here)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images sampled together (8)")
    add_engine_arguments(parser)
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help=f"keep nothing of what was compiled (else in {cache_folder()}, or where DIFFPRESS_CACHE says)",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that become EngineOptions; an engine refuses those that it does not know."""
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads (all)")
    parser.add_argument("--streams", type=int, default=1, metavar="S", help="batches run at the same time (1)")
    parser.add_argument(
        "--precision", choices=PRECISIONS, default="f32", help="what float layers may compute in, where it can (f32)"
    )
    parser.add_argument(
        "--providers", nargs="+", default=[], metavar="P", help=f"for onnxruntime, in order: {', '.join(PROVIDERS)}"
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="for tensorrt: build a plan for this GPU where the bundle has none"
    )


def engine_options(args: argparse.Namespace, cache: Cache | None) -> EngineOptions:
    return EngineOptions(
        threads=args.threads,
        streams=args.streams,
        precision=args.precision,
        providers=tuple(args.providers),
        rebuild=args.rebuild,
        cache=cache,
    )


def chosen_engine(args: argparse.Namespace) -> str | None:
    """The engine that was named; None leaves it to what can run here. Only tensorrt builds anything again."""
    return args.engine or ("tensorrt" if args.rebuild else None)


def sample_command(args: argparse.Namespace) -> int:
    """Sample, write the grid, say where it is and how long an image took; raises DiffpressError."""
    if args.number < 1 or args.batch < 1:
        raise BadInput(f"-n {args.number} --batch {args.batch}: both must be at least 1")
    if not 0 <= args.seed <= MAX_SEED - args.number:
        raise BadInput(f"--seed {args.seed}: must lie in 0..{MAX_SEED - args.number}")
    options = engine_options(args, None if args.no_cache else Cache(cache_folder()))
    bundle = load_bundle(args.bundle)
    spec = bundle.spec
    if args.size is not None:
        spec = resized(spec, parsed_size(args.size), has_fixed_size(bundle))
    spec = asked_spec(spec, args.steps, args.solver, args.grid, args.guidance)
    _check_wishes(spec.conditioning, args.label, args.prompt, args.negative)
    with plain_warnings(), closing(Pipeline(bundle, chosen_engine(args), options=options)) as pipeline:
        spec = bundle.spec_for(pipeline.denoiser.name, spec)
        if pipeline.spec.plan.corrections and not spec.plan.corrections:
            _warn("this plan is not the bundle's own: the corrections of rounding measured for that are left out")
        conditions = pipeline.conditions(
            args.number,
            spec,
            labels=None if args.label is None else np.full(args.number, args.label),
            prompts=None if args.prompt is None else [args.prompt] * args.number,
            negatives=None if args.negative is None else [args.negative] * args.number,
            warn=_warn,
        )
        # compiling for this batch size belongs to loading, not to the time per image
        warm_up(pipeline.denoiser, spec, min(args.batch, args.number))
        start = time.perf_counter()
        seeds = np.arange(args.seed, args.seed + args.number)
        images = np.concatenate(list(pipeline.images(seeds, conditions, spec, args.batch)))
        image_ms = (time.perf_counter() - start) * 1e3 / args.number
        engine = ran_in(pipeline.denoiser)
    write_png(grid(to_uint8(images, spec.data_range)), args.out)
    made = "1 image" if args.number == 1 else f"{args.number} images"
    print(f"{args.out}: {made}, {own_plan(spec)} in {engine}, {image_ms:.1f} ms per image")
    return 0


def ran_in(engine: Engine) -> str:
    """The engine's name, and what it ran on where that is not the processor."""
    return engine.name if engine.device == CPU else f"{engine.name} ({engine.device})"


def parsed_size(text: str) -> tuple[int, int]:
    """'512x768' -> (512, 768), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise BadInput(f"--size {text}: give height and width in pixels, as in 512x768")
    return int(match[1]), int(match[2])


def asked_spec(
    spec: DenoiserSpec,
    steps: int | None,
    solver: str | None = None,
    grid: str | None = None,
    guidance: float | None = None,
) -> DenoiserSpec:
    """The spec with the plan that was asked for (chosen_plan); says so where a distilled network was not taught it."""
    plan = chosen_plan(spec, steps, solver, grid, guidance)
    if spec.distilled and not _is_taught(spec, plan):
        _warn(f"this network was distilled for {_taught(spec)}; the quality of other plans is not promised")
    return spec.with_plan(plan)


def chosen_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, grid: str | None, guidance: float | None
) -> Plan:
    """The spec's plan with what was asked for in its place; new timesteps lie as the model's spacing has them, or as a
    distilled network was taught so many.

    A plan that differs from the spec's in anything is left without its corrections. Raises BadInput for a solver that
    does not fit a distilled network.
    """
    plan = spec.plan.uncorrected
    if steps is not None or grid is not None:
        count = plan.steps if steps is None else steps
        spacing = spec.spacing if grid is None else replace(spec.spacing, grid=grid, offset=0)
        taught = (spec.plan.timesteps, *spec.distilled_also) if spec.distilled and grid is None else ()
        timesteps = next((known for known in taught if len(known) == count), None)
        if timesteps is None:
            timesteps = spaced_timesteps(spacing, count, spec.schedule, spec.tokens(spec.sample_shape))
        plan = plan.over(timesteps)
    if solver is not None:
        plan = with_solver(plan, solver)
        if spec.distilled and not {solver, spec.plan.solver} <= ALIKE and solver != spec.plan.solver:
            raise BadInput(
                f"--solver {solver}: this network was distilled ({spec.distilled}) for {_taught(spec)}, and other "
                "solvers do not fit it; leave the solver out"
            )
    if guidance is not None:
        plan = replace(plan, guidance=guidance)
    return spec.plan if plan == spec.plan.uncorrected else plan


def own_plan(spec: DenoiserSpec) -> str:
    return f"{spec.plan.steps} {'step' if spec.plan.steps == 1 else 'steps'} of {spec.plan.solver}"


def _taught(spec: DenoiserSpec) -> str:
    others = "".join(f" or {len(timesteps)}" for timesteps in spec.distilled_also)
    return f"its own plan, {own_plan(spec)}{others and f' ({others[1:]})'}"


def _is_taught(spec: DenoiserSpec, plan: Plan) -> bool:
    """Whether a distilled network was taught this plan: its own, or it over other timesteps that it knows."""
    return plan == spec.plan or any(plan == spec.plan.uncorrected.over(other) for other in spec.distilled_also)


def _check_wishes(conditioning: Conditioning, label: int | None, prompt: str | None, negative: str | None) -> None:
    """BadInput for a label or a prompt that this kind of model does not take, or the lack of one that it needs."""
    if conditioning.kind != "text" and (prompt is not None or negative is not None):
        flag = "--prompt" if prompt is not None else "--negative"
        raise BadInput(f"{flag}: the model is not conditioned on text; {_instead(conditioning)}")
    if conditioning.kind == "text" and prompt is None:
        raise BadInput("the model is conditioned on text: say what to show with --prompt TEXT")
    if label is not None and conditioning.kind != "class":
        raise BadInput("--label: the model is not class-conditional; leave the label out")
    if label is not None and not 0 <= label < conditioning.classes:
        raise BadInput(f"--label {label}: the model knows the classes 0..{conditioning.classes - 1}")


def _instead(conditioning: Conditioning) -> str:
    return f"use --label 0..{conditioning.classes - 1}" if conditioning.kind == "class" else "leave it out"


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)
