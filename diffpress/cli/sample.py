"""`diffpress sample`: sample a bundle without torch and write one PNG with all images."""

from __future__ import annotations

import argparse
import logging
import time
from contextlib import closing
from pathlib import Path

from diffpress.cli.arguments import add_engine_arguments, chosen_engine, engine_options, parsed_size
from diffpress.runtime.conditioning import Conditioning
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.engines.cache import Cache, cache_folder
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS

logger = logging.getLogger(__name__)

EXAMPLE = 'diffpress sample work/bundle --prompt "a lighthouse in the fog" -n 4 --steps 20 --out lighthouse.png'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress sample`; what is left out follows the bundle's own sampling plan."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument("-n", "--number", type=int, default=16, metavar="N", help="number of images (16)")
    parser.add_argument("--seed", type=int, default=0, help="image i starts from seed + i (0)")
    parser.add_argument(
        "--out", type=Path, default=Path("grid.png"), metavar="PNG", help="file for the image grid (grid.png)"
    )
    request = parser.add_mutually_exclusive_group()
    request.add_argument("--label", type=int, metavar="K", help="class of all images (default: all classes in turn)")
    request.add_argument("--prompt", metavar="TEXT", help="text, for a model conditioned on text")
    parser.add_argument("--negative", metavar="TEXT", help="what the image should not show; needs guidance above 1")
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, for models that allow other sizes")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--solver", metavar="S", help=", ".join(SOLVERS))
    parser.add_argument(
        "--spacing", metavar="S", help="timestep spacing: leading, trailing, linspace, quad, karras, ..."
    )
    parser.add_argument("--grid", dest="spacing", help=argparse.SUPPRESS)  # its name in diffpress 0.1
    parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance weight; 1 is off")
    parser.add_argument("--engine", metavar="E", help=f"{', '.join(ENGINES)} (the first of these that can run here)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images sampled together (8)")
    add_engine_arguments(parser)
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help=f"do not cache compiled graphs (default: in {cache_folder()}, or in DIFFPRESS_CACHE)",
    )


def run(args: argparse.Namespace) -> int:
    """Sample, write the image grid, and print where it is and the time per image; raises DiffpressError."""
    import numpy as np

    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.engines import engine_label
    from diffpress.runtime.io.images import image_grid, to_uint8, write_png
    from diffpress.runtime.pipeline import Pipeline, has_fixed_size, resized
    from diffpress.runtime.requested_plan import plan_description, requested_spec
    from diffpress.runtime.sampler import MAX_SEED, warm_up

    if args.out.suffix not in ("", ".png"):
        raise InvalidInputError(f"--out {args.out}: images are written as PNG; choose a file that ends in .png")
    if args.number < 1 or args.batch < 1:
        raise InvalidInputError(f"-n {args.number} --batch {args.batch}: both must be at least 1")
    if not 0 <= args.seed <= MAX_SEED - args.number:
        raise InvalidInputError(f"--seed {args.seed}: must lie in 0..{MAX_SEED - args.number}")
    options = engine_options(args, None if args.no_cache else Cache(cache_folder()))
    bundle = load_bundle(args.bundle)
    spec = bundle.spec
    if args.size is not None:
        spec = resized(spec, parsed_size(args.size), has_fixed_size(bundle))
    spec = requested_spec(spec, args.steps, args.solver, args.spacing, args.guidance)
    _check_request(spec.conditioning, args.label, args.prompt, args.negative)
    with closing(Pipeline(bundle, chosen_engine(args), options=options)) as pipeline:
        spec = bundle.spec_for(pipeline.denoiser.name, spec)
        if pipeline.spec.plan.output_corrections and not spec.plan.output_corrections:
            logger.warning(
                "the requested plan differs from the bundle's: its output corrections do not apply and are disabled"
            )
        conditions = pipeline.conditions(
            args.number,
            spec,
            labels=None if args.label is None else np.full(args.number, args.label),
            prompts=None if args.prompt is None else [args.prompt] * args.number,
            negatives=None if args.negative is None else [args.negative] * args.number,
        )
        # compiling for this batch size is part of loading, not of the time per image
        warm_up(pipeline.denoiser, spec, min(args.batch, args.number))
        start = time.perf_counter()
        seeds = np.arange(args.seed, args.seed + args.number)
        images = np.concatenate(list(pipeline.images(seeds, conditions, spec, args.batch)))
        image_ms = (time.perf_counter() - start) * 1e3 / args.number
        engine = engine_label(pipeline.denoiser)
    write_png(image_grid(to_uint8(images, spec.data_range)), args.out)
    made = "1 image" if args.number == 1 else f"{args.number} images"
    print(f"{args.out}: {made}, {plan_description(spec)} in {engine}, {image_ms:.1f} ms per image")
    return 0


def _check_request(conditioning: Conditioning, label: int | None, prompt: str | None, negative: str | None) -> None:
    """Raise InvalidInputError for a label or prompt that this model does not take, or for a missing prompt."""
    if conditioning.kind != "text" and (prompt is not None or negative is not None):
        flag = "--prompt" if prompt is not None else "--negative"
        raise InvalidInputError(f"{flag}: the model is not conditioned on text; {_alternative(conditioning)}")
    if conditioning.kind == "text" and prompt is None:
        raise InvalidInputError("the model is conditioned on text: give a prompt with --prompt TEXT")
    if label is not None and conditioning.kind != "class":
        raise InvalidInputError("--label: the model is not class-conditional; leave the label out")
    if label is not None and not 0 <= label < conditioning.classes:
        raise InvalidInputError(f"--label {label}: the model has the classes 0..{conditioning.classes - 1}")


def _alternative(conditioning: Conditioning) -> str:
    return f"use --label 0..{conditioning.classes - 1}" if conditioning.kind == "class" else "leave it out"
