"""`diffpress bench`: a bundle against its baselines, in one run. Torch is imported only for a torch baseline.

PyTorch eager     the baseline checkpoint as people run it today: DDIM with 50 steps, or as its pipeline does
the same engine   the baseline bundle (or the one beside BUNDLE) in fp32
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from runtime.bench import (
    TORCH,
    Subject,
    bundle_subject,
    measure,
    sample_once,
    sampler_overhead,
    table,
)
from runtime.bundle import MANIFEST, Bundle, load_bundle
from runtime.commands import add_engine_arguments, chosen_engine, engine_options, ran_in
from runtime.engines import Engine, installed, open_engine
from runtime.engines.cache import Cache, cache_folder
from runtime.errors import DiffpressError, plain_warnings
from runtime.files import write_json
from runtime.sampler import network_evaluations
from runtime.schedule import make_plan

BASELINE_SOLVER, BASELINE_STEPS = "ddim", 50


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", type=Path, metavar="BUNDLE")
    parser.add_argument(
        "--baseline",
        metavar="CHECKPOINT_OR_BUNDLE",
        action="append",
        default=[],
        help="what to compare with: a checkpoint runs in PyTorch with DDIM-50, a bundle in each engine "
        "by its own plan; may be given twice",
    )
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument(
        "--engine", nargs="+", help="engines to measure, or 'all' that are installed (default: the preferred one)"
    )
    parser.add_argument("--repeats", type=int, default=3)
    add_engine_arguments(parser)
    parser.add_argument("--json", type=Path, metavar="FILE")


def bench_command(args: argparse.Namespace) -> int:
    bundle = load_bundle(args.bundle)
    # `load_ms` is that of a first load; only a plan that has to be built is taken from where it was kept
    options = engine_options(args, Cache(cache_folder()) if args.rebuild else None)
    every = args.engine == ["all"]
    engines: list[str | None] = [*(installed() if every else args.engine or [chosen_engine(args)])]
    left_out: dict[str, str] = {}
    with plain_warnings(), ExitStack() as stack:
        subjects: list[Subject] = []
        overheads = {}

        def add(of: Bundle, name: str | None) -> Engine | None:
            try:
                engine = stack.enter_context(closing(open_engine(of, name, options=options)))
                subjects.append(bundle_subject(of, engine, batches=args.batch, options=options))
            except DiffpressError as error:
                if not every:  # it was asked for by name
                    raise
                left_out[f"{of.path.name} in {name}"] = str(error)
                return None
            return engine

        for baseline in args.baseline:
            if (Path(baseline) / MANIFEST).is_file():
                other = load_bundle(baseline)
                for name in engines:
                    add(other, name)
            else:
                subjects.append(torch_subject(baseline, args.batch, args.threads))
        for name in engines:
            engine = add(bundle, name)
            if engine is not None:
                overheads[ran_in(engine)] = sampler_overhead(engine, bundle.spec, min(args.batch), args.repeats)
        for what, reason in left_out.items():
            print(f"left out: {what}: {reason}")
        result: dict[str, Any] = measure(subjects, args.batch, args.repeats)
    result |= {"sampler_overhead": overheads, "left_out": left_out}
    print(table(result["rows"]))
    for name, share in overheads.items():
        print(f"sampler's own time outside {name}: {share:.2%} of a sampling at batch {min(args.batch)}")
    if args.json:
        write_json(args.json, result)
        print(f"written to {args.json}")
    return 0


def torch_subject(reference: str, batches: Sequence[int], threads: int | None = None) -> Subject:
    """The checkpoint in PyTorch eager, float32: models of pixels sampled with DDIM-50, what most people run today, and
    those of latents by the plan their pipeline has."""
    import torch

    from compress.counts import count
    from compress.load import load_checkpoint
    from compress.torch_network import TorchNetwork

    if threads:
        torch.set_num_threads(threads)
    checkpoint = load_checkpoint(reference)
    spec = checkpoint.spec
    if spec.is_pixel_space:
        steps = min(BASELINE_STEPS, len(spec.schedule))
        spec = spec.with_plan(make_plan(BASELINE_SOLVER, steps, spec.schedule, clip=spec.plan.clip))
    one_step = replace(spec.plan, timesteps=spec.plan.timesteps[:1])
    network = TorchNetwork(checkpoint.model, spec)
    return Subject(
        name=f"{Path(reference).name} (PyTorch eager)",
        engine=TORCH,
        precision="fp32",
        steps=spec.plan.steps,
        nfe=network_evaluations(spec),
        size_mib=count(checkpoint.model, spec).fp32_bytes / 2**20,
        integer_mac_share=0.0,
        sample=lambda batch: sample_once(network, spec, batch),
        step=lambda batch: sample_once(network, spec.with_plan(one_step), batch),
    )
