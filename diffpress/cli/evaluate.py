"""`diffpress evaluate`: scores of a bundle's or checkpoint's samples."""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path

from diffpress.compress.builtin import FEATURES, REFERENCE
from diffpress.runtime.errors import InvalidInputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("subject", metavar="BUNDLE_OR_CHECKPOINT")
    parser.add_argument(
        "--reference",
        type=Path,
        default=REFERENCE,
        metavar="DATA",
        help="npz of real images, or of their features (default: Fashion-MNIST's test images)",
    )
    parser.add_argument("--features", type=Path, default=FEATURES, metavar="NET", help="feature network, ONNX")
    parser.add_argument("--against", metavar="BUNDLE_OR_CHECKPOINT", help="also PSNR and SSIM to this one, same noise")
    parser.add_argument("--samples", type=int, default=2000, help="images for each seed (2000)")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, metavar="N", help="another number of steps than its plan's")
    parser.add_argument("--engine")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--json", type=Path, metavar="FILE")


def run(args: argparse.Namespace) -> int:
    from diffpress.compress.config import EvaluateConfig
    from diffpress.compress.evaluation.evaluate import evaluate, paired
    from diffpress.compress.evaluation.features import load_features, load_reference
    from diffpress.compress.evaluation.subject import open_network, print_evaluation
    from diffpress.runtime.io.files import write_json
    from diffpress.runtime.requested_plan import requested_spec

    for name in ("samples", "seeds", "batch"):
        if getattr(args, name) < (8 if name == "samples" else 1):
            raise InvalidInputError(
                f"--{name} {getattr(args, name)}: too few (samples: at least 8, seeds and batch: 1)"
            )
    network, spec = open_network(args.subject, args.engine, args.threads)
    with closing(network):
        spec = requested_spec(spec, args.steps)
        features = load_features(args.features, spec, args.threads)
        reference = load_reference(args.reference, features, spec)
        config = EvaluateConfig(samples=args.samples, seeds=args.seeds, batch=args.batch)
        result = evaluate(network, spec, config, features, reference)
        if args.against:
            other, _ = open_network(args.against, args.engine, args.threads)
            with closing(other):
                result["paired"] = paired(network, other, spec, config, Path(args.against).name)
    print_evaluation(Path(args.subject).name, result)
    if args.json:
        write_json(args.json, result)
    return 0
