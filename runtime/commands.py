"""`diffpress sample`: a bundle and a few wishes in, one PNG grid out."""

from __future__ import annotations

import argparse
import time
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np

from runtime.bundle import load_bundle
from runtime.denoise import network_inputs
from runtime.engines import open_engine
from runtime.errors import BadInput
from runtime.images import grid, to_uint8, write_png
from runtime.sampler import MAX_SEED, generate, labels_in_turn
from runtime.schedule import timestep_grid
from runtime.solvers import solver_named
from runtime.spec import Conditioning, DenoiserSpec, Plan


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
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--solver", metavar="S", help="ddim, euler, dpmpp_2m or ipndm")
    parser.add_argument(
        "--grid", metavar="G", help="spacing of the steps: leading, trailing, linspace, quad, karras, ..."
    )
    parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance weight, 1 is off")
    parser.add_argument("--engine", metavar="E", help="openvino or onnxruntime (the fastest one installed)")
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads (all)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images sampled together (8)")


def sample_command(args: argparse.Namespace) -> int:
    """Sample, write the grid, say where it is and how long an image took; raises DiffpressError."""
    if args.number < 1 or args.batch < 1:
        raise BadInput(f"-n {args.number} --batch {args.batch}: both must be at least 1")
    if not 0 <= args.seed <= MAX_SEED - args.number:
        raise BadInput(f"--seed {args.seed}: must lie in 0..{MAX_SEED - args.number}")
    bundle = load_bundle(args.bundle)
    spec = bundle.spec
    plan = chosen_plan(spec, args.steps, args.solver, args.grid, args.guidance)
    labels = chosen_labels(spec, args.number, args.label, args.prompt)
    seeds = np.arange(args.seed, args.seed + args.number)
    with closing(open_engine(bundle, args.engine, args.threads)) as engine:
        # compiling for this batch size belongs to loading, not to the time per image
        engine.run(network_inputs(engine, spec.with_plan(plan), min(args.batch, args.number)))
        start = time.perf_counter()
        images = generate(engine, spec, seeds, labels, plan, args.batch)
        image_ms = (time.perf_counter() - start) * 1e3 / args.number
    write_png(grid(to_uint8(images, spec.data_range)), args.out)
    print(
        f"{args.out}: {args.number} images, {plan.steps} steps of {plan.solver} in {engine.name}, "
        f"{image_ms:.1f} ms per image"
    )
    return 0


def chosen_plan(
    spec: DenoiserSpec, steps: int | None, solver: str | None, grid: str | None, guidance: float | None
) -> Plan:
    """The spec's plan with what was asked for in its place; new timesteps are `trailing` by default."""
    plan = spec.plan
    if steps is not None or grid is not None:
        count = plan.steps if steps is None else steps
        plan = replace(plan, timesteps=timestep_grid(grid or "trailing", count, spec.schedule))
    if solver is not None:
        solver_named(solver)
        plan = replace(plan, solver=solver)
    return plan if guidance is None else replace(plan, guidance=guidance)


def chosen_labels(spec: DenoiserSpec, number: int, label: int | None, prompt: str | None) -> np.ndarray | None:
    """`number` labels: all `label`, or the model's classes in turn; None for a model without classes."""
    conditioning = spec.conditioning
    if prompt is not None and conditioning.kind != "text":
        raise BadInput(f"--prompt: the model is not conditioned on text; {_instead(conditioning)}")
    if label is None:
        return labels_in_turn(spec, number)
    if conditioning.kind != "class":
        raise BadInput("--label: the model is not class-conditional; leave the label out")
    if not 0 <= label < conditioning.classes:
        raise BadInput(f"--label {label}: the model knows the classes 0..{conditioning.classes - 1}")
    return np.full(number, label)


def _instead(conditioning: Conditioning) -> str:
    return f"use --label 0..{conditioning.classes - 1}" if conditioning.kind == "class" else "leave the prompt out"
