"""`diffpress profile`: where the time of one evaluation goes, by layer and by operation, and what is worth doing."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import (
    add_cache_argument,
    add_engine_arguments,
    add_signature_argument,
    chosen_engine,
    compiled_cache,
    engine_options,
    parsed_size,
)
from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress profile work/bundle --engine openvino --json profile.json"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress profile`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="folder with a manifest.json")
    parser.add_argument("--engine", metavar="E", help="onnxruntime or openvino (the first that can run here)")
    parser.add_argument(
        "--component",
        default="denoiser",
        metavar="NAME",
        help="graph of the bundle: denoiser, vae_decoder, text_encoder, ...; 'cached' is the cached graph of a step "
        "cache (denoiser)",
    )
    parser.add_argument("--batch", type=int, default=1, metavar="N", help="images of the evaluation (1)")
    parser.add_argument("--size", metavar="HxW", help="height and width in pixels, for models that allow other sizes")
    parser.add_argument("--top", type=int, default=5, metavar="N", help="layers to show, longest first (5)")
    add_engine_arguments(parser)
    add_cache_argument(parser)
    add_signature_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the profile as JSON, with every layer")


def run(args: argparse.Namespace) -> int:
    """Profile, print the tables and the findings, and write JSON if asked."""
    from diffpress.runtime.benchmarking.bundle_profile import profile_bundle
    from diffpress.runtime.benchmarking.profile_text import profile_text
    from diffpress.runtime.bundle import load_bundle
    from diffpress.runtime.io.files import write_json

    if args.top < 1:
        raise InvalidInputError(f"--top {args.top}: must be at least 1")
    profile = profile_bundle(
        load_bundle(args.bundle, args.public_key),
        chosen_engine(args),
        component=args.component,
        batch=args.batch,
        size=None if args.size is None else parsed_size(args.size),
        options=engine_options(args, compiled_cache(args)),
    )
    print(profile_text(profile, args.top))
    if args.json:
        write_json(args.json, profile)
        print(f"written to {args.json}")
    return 0
