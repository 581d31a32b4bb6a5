"""`diffpress evaluate`: scores of a bundle's or checkpoint's samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffpress.cli.arguments import add_engine_arguments, add_signature_argument, chosen_engine, engine_options
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.engines.cache import Cache, cache_folder

EXAMPLE = "diffpress evaluate work/bundle --against work/baseline --samples 500"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress evaluate`."""
    parser.add_argument("subject", metavar="BUNDLE_OR_CHECKPOINT", help="what to score")
    parser.add_argument(
        "--reference",
        type=Path,
        metavar="DATA",
        help="npz or folder of real images, or npz of their features (default: Fashion-MNIST's test images for the "
        "built-in features, else samples of --against)",
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="NET",
        help="image encoder, ONNX; with a text encoder (CLIP) it also scores prompts (default: the built-in one, for "
        "28 x 28 grey images)",
    )
    parser.add_argument("--prompts", type=Path, metavar="FILE", help="prompts of a text model, one per line, in turn")
    parser.add_argument(
        "--candidates",
        type=Path,
        metavar="FILE",
        help="texts for the retrieval accuracy, one per line: an image is correct if its nearest text is the longest "
        "one that its prompt contains (default: the distinct prompts)",
    )
    parser.add_argument(
        "--against", metavar="BUNDLE_OR_CHECKPOINT", help="also compute PSNR and SSIM to this one, from the same noise"
    )
    parser.add_argument("--samples", type=int, help="images for each seed (2000; 64 for models of latents)")
    parser.add_argument("--seeds", type=int, default=3, help="independent draws (3)")
    parser.add_argument("--batch", type=int, default=64, help="images sampled together (64)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps other than the sampling plan's")
    parser.add_argument(
        "--engine", metavar="E", help=f"of a bundle: {', '.join(ENGINES)} (the first of these that can run here)"
    )
    add_engine_arguments(parser)
    add_signature_argument(parser)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the scores as JSON")


def run(args: argparse.Namespace) -> int:
    """Score the subject's samples, print the scores and write them as JSON where asked."""
    from diffpress.api import evaluate
    from diffpress.compress.evaluation.summary import log_evaluation
    from diffpress.runtime.io.files import write_json

    result = evaluate(
        args.subject,
        against=args.against,
        samples=args.samples,
        seeds=args.seeds,
        batch=args.batch,
        steps=args.steps,
        features=args.features,
        reference=args.reference,
        prompts=args.prompts,
        candidates=args.candidates,
        engine=chosen_engine(args),
        options=engine_options(args, Cache(cache_folder()) if args.rebuild else None),
        public_key=args.public_key,
    )
    log_evaluation(Path(args.subject).name, result)
    if args.json:
        write_json(args.json, result)
    return 0
