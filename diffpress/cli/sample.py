"""`diffpress sample`: sample a bundle without torch, and write what is made as it is made."""

from __future__ import annotations

import argparse
import logging
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from diffpress.cli.arguments import (
    add_cache_argument,
    add_engine_arguments,
    add_signature_argument,
    chosen_engine,
    compiled_cache,
    engine_options,
    parsed_size,
    utf8_text,
)
from diffpress.cli.progress_bar import is_shown, progress_bar
from diffpress.runtime.call_arguments import RequestArguments, check_request
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.errors import InvalidInputError
from diffpress.runtime.solvers import SOLVERS

if TYPE_CHECKING:
    from diffpress.runtime.bundle import Bundle
    from diffpress.runtime.image_inputs.control import ControlRequest
    from diffpress.runtime.image_inputs.request import ImageRequest
    from diffpress.runtime.sample_request import SampleRequest
    from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)

EXAMPLE = 'diffpress sample work --prompt "a lighthouse in the fog" -n 4 --steps 20 --out lighthouse/'
DEFAULT_NUMBER = 16  # of a model without prompts
MAX_NUMBER = 10**7
ARGUMENTS = RequestArguments(
    {
        "--prompt": "text",
        "--prompt-file": "text",
        "--negative": "text",
        "--label": "class",
        "--conditioning": "tensors",
    },
    ("--negative",),
    {
        "text": "give a prompt with --prompt TEXT",
        "class": "use --label 0..{last}",
        "tensors": "give the arrays {tensors} with --conditioning FILE.npz",
        "none": "leave it out",
    },
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress sample`; what is left out follows the bundle's own sampling plan."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder of a bundle or of a compress run")
    parser.add_argument(
        "-n",
        "--number",
        type=int,
        metavar="N",
        help=f"number of images ({DEFAULT_NUMBER}); with prompts, images for each prompt (1)",
    )
    parser.add_argument("--seed", type=int, default=0, help="image i starts from seed + i (0)")
    parser.add_argument(
        "--out",
        default="grid.png",
        metavar="PATH",
        help="DIR/ for one PNG per image, named by its seed; a .png, .jpg or .webp file for one image grid; a .npy or "
        ".npz file for float32 samples (grid.png)",
    )
    request = parser.add_mutually_exclusive_group()
    request.add_argument("--label", type=int, metavar="K", help="class of all images (default: all classes in turn)")
    request.add_argument("--prompt", type=utf8_text, metavar="TEXT", help="text, for a model conditioned on text")
    request.add_argument("--prompt-file", type=Path, metavar="FILE", help="text file with one prompt per line")
    request.add_argument(
        "--conditioning", type=Path, metavar="NPZ", help="arrays by name, for a model conditioned on tensors"
    )
    parser.add_argument(
        "--negative", type=utf8_text, metavar="TEXT", help="what no image should show; needs guidance above 1"
    )
    add_image_arguments(parser)
    add_control_arguments(parser)
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="PATH[:SCALE]",
        help="LoRA to set, for a bundle with slots; may be repeated",
    )
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, for models that allow other sizes")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps")
    parser.add_argument("--solver", metavar="S", help=", ".join(SOLVERS))
    parser.add_argument(
        "--spacing", metavar="S", help="timestep spacing: leading, trailing, linspace, quad, karras, ..."
    )
    parser.add_argument("--grid", dest="spacing", help=argparse.SUPPRESS)  # its name in diffpress 0.1
    parser.add_argument("--guidance", type=float, metavar="W", help="classifier-free guidance weight; 1 is off")
    parser.add_argument(
        "--no-step-cache", action="store_true", help="evaluate the whole network in every step, whatever the plan says"
    )
    parser.add_argument("--engine", metavar="E", help=f"{', '.join(ENGINES)} (the first of these that can run here)")
    parser.add_argument("--batch", type=int, default=8, metavar="B", help="images sampled together (8)")
    add_engine_arguments(parser)
    add_signature_argument(parser)
    add_cache_argument(parser)


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of sampling from an image."""
    parser.add_argument("--image", type=Path, metavar="FILE", help="image to start from; the result has its size")
    parser.add_argument("--mask", type=Path, metavar="FILE", help="image of the same size: what is white is repainted")
    parser.add_argument(
        "--strength",
        type=float,
        metavar="S",
        help="share of the steps that is run from the image, above 0 and at most 1 (0.8; with a mask 1)",
    )
    parser.add_argument("--overlay", action="store_true", help="keep the unmasked pixels of the image exactly")


def add_control_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of control images; each may be repeated, in the order of the bundle's control networks."""
    group = parser.add_argument_group("control images (repeat each for several control networks, in their order)")
    group.add_argument(
        "--control-image", type=Path, action="append", default=[], metavar="FILE", help="image of the result's size"
    )
    for name, metavar, text in (
        ("--control-scale", "S", "weight of the control; 0 leaves it out (1)"),
        ("--control-start", "F", "share of the steps after which control begins (0)"),
        ("--control-end", "F", "share of the steps after which it stops (1)"),
    ):
        group.add_argument(name, type=float, action="append", metavar=metavar, help=text)


def run(args: argparse.Namespace) -> int:
    """Sample, write the output, and print where it is and the time per image; raises DiffpressError."""
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.engines import engine_label
    from diffpress.runtime.image_inputs.control import read_control_request
    from diffpress.runtime.image_inputs.request import read_image_request
    from diffpress.runtime.io.sample_files import check_output
    from diffpress.runtime.lora.read import parsed_loras
    from diffpress.runtime.pipeline import Pipeline
    from diffpress.runtime.requested_plan import plan_description
    from diffpress.runtime.sample_run import RunImages, SampleRun, check_samples

    check_output(args.out)
    for flag, value in (("-n", args.number), ("--batch", args.batch)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{flag} {value}: must be at least 1")
    options = engine_options(args, compiled_cache(args))
    image = read_image_request(args.image, args.mask, args.strength, args.overlay, prefix="--")
    windows = args.control_scale, args.control_start, args.control_end
    control = read_control_request(args.control_image, *windows, prefix="--")
    bundle = load_bundle(args.bundle, args.public_key)
    spec, first = _requested_spec(bundle, args, image, control)
    request = _request(args, spec)
    with closing(Pipeline(bundle, chosen_engine(args), options=options, loras=parsed_loras(args.lora))) as pipeline:
        spec = bundle.spec_for(pipeline.denoiser.name, spec)
        _warn_of_lost_corrections(pipeline.spec, spec)
        check_samples(pipeline, spec, request, args.out)
        images = None if image is None else RunImages(image, pipeline.image_start(image, spec, first, len(request)))
        controlled = None if control is None else pipeline.control(control, len(request))
        work = SampleRun(pipeline, spec, request, args.out, args.batch, options, images, controlled)
        with progress_bar(len(work), "images") as advance:
            seconds = work.sample(advance, shows_steps=is_shown())
        what = "image" if pipeline.makes_pictures else "sample"
        engine = engine_label(pipeline.denoiser)
    made, finished = len(work), len(request) - len(work)
    each = f" of {len(request.prompts)} prompts" if len(request.prompts) > 1 else ""
    if not made:
        print(f"{args.out}: nothing to do, {_count(finished, what)}{each} finished before")
        return 0
    print(
        f"{args.out}: {_count(made, what)}{each}, {plan_description(spec, first)} in {engine}, "
        f"{seconds * 1e3 / made:.1f} ms per {what}" + (f"; {finished} finished before" if finished else "")
    )
    return 0


def _warn_of_lost_corrections(own: DenoiserSpec, requested: DenoiserSpec) -> None:
    """Warn if the requested plan has none of the output corrections that the bundle's own plan has."""
    from diffpress.runtime.requested_plan import plan_description

    if own.plan.output_corrections and not requested.plan.output_corrections:
        logger.warning(
            f"the bundle's output corrections were measured for {plan_description(own)} at guidance "
            f"{own.plan.guidance:g}; they do not fit the requested solver or guidance and are left out, so that the "
            "images contain more of the quantization error"
        )


def _requested_spec(
    bundle: Bundle, args: argparse.Namespace, image: ImageRequest | None, control: ControlRequest | None
) -> tuple[DenoiserSpec, int]:
    """Return the spec with the requested plan and size, and the first step that is run."""
    from diffpress.runtime.image_inputs.control import controlled_spec
    from diffpress.runtime.image_inputs.strength import with_strength
    from diffpress.runtime.image_size import sized
    from diffpress.runtime.requested_plan import requested_spec

    spec = sized(bundle, None if args.size is None else parsed_size(args.size), image, control)
    cached = not args.no_step_cache
    spec = requested_spec(spec, args.steps, args.solver, args.spacing, args.guidance, step_cache=cached)
    spec = spec if control is None else controlled_spec(spec)
    return (spec, 0) if image is None else with_strength(spec, image.strength, "--strength")


def _request(args: argparse.Namespace, spec: DenoiserSpec) -> SampleRequest:
    """Return what the arguments ask for; raises InvalidInputError if the model does not take it."""
    from diffpress.runtime.io.prompt_file import read_prompt_file
    from diffpress.runtime.network_inputs import read_conditioning
    from diffpress.runtime.sample_request import SampleRequest
    from diffpress.runtime.sampler import MAX_SEED

    given = {name: getattr(args, name.removeprefix("--").replace("-", "_")) for name in ARGUMENTS.kinds}
    check_request(spec.conditioning, given, ARGUMENTS)
    prompts: tuple[str, ...] = () if args.prompt is None else (args.prompt,)
    if args.prompt_file is not None:
        prompts = read_prompt_file(args.prompt_file)
    tensors = {} if args.conditioning is None else read_conditioning(args.conditioning, spec)
    rows = {
        name: len(array)
        for name, array in tensors.items()
        if array.ndim == len(spec.conditioning.tensors[name].shape) + 1
    }
    number = args.number or (1 if prompts else next(iter(rows.values()), DEFAULT_NUMBER))
    if number < 1:
        raise InvalidInputError(f"--conditioning {args.conditioning}: has no rows; give one row per sample")
    for name, count in rows.items():
        if count != number:
            raise InvalidInputError(
                f"--conditioning {args.conditioning}: '{name}' has {count} rows for {number} samples; leave out -n"
            )
    request = SampleRequest(args.seed, number, prompts, args.negative, args.label, tensors)
    if len(request) > MAX_NUMBER:
        raise InvalidInputError(f"-n {number}: {len(request)} images are more than {MAX_NUMBER}; make them in parts")
    if not 0 <= args.seed <= MAX_SEED - len(request):
        raise InvalidInputError(f"--seed {args.seed}: must lie in 0..{MAX_SEED - len(request)}")
    return request


def _count(number: int, what: str) -> str:
    return f"1 {what}" if number == 1 else f"{number} {what}s"
