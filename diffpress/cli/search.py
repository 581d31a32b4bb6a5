"""`diffpress search`: find recipes under bounds, and export the best of them."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffpress.cli.arguments import add_checkpoint_arguments, loaded
from diffpress.compress.builtin import SELECTION_REFERENCE, TEACHER
from diffpress.runtime.errors import InvalidInputError

EXAMPLE = "diffpress search my-pipeline --max-size-mib 4 --time 1h --out search"
ENGINES = ("openvino", "onnxruntime")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress search`."""
    add_checkpoint_arguments(parser)
    bounds = "relative to the fp32 teacher under its own sampling plan in the same engine"
    parser.add_argument("--max-latency-ratio", type=float, metavar="R", help=f"bound on the time of an image, {bounds}")
    parser.add_argument("--max-frechet-ratio", type=float, metavar="R", help="bound on the Fréchet distance, likewise")
    parser.add_argument("--max-size-mib", type=float, metavar="S", help="bound on the size of the denoiser's file")
    parser.add_argument("--time", metavar="T", help="time of the whole search, as in 90s, 60m or 8h")
    parser.add_argument("--trials", type=int, metavar="N", help="number of trials (30 without --time)")
    parser.add_argument("--engine", choices=ENGINES, help="engine that latency is measured in (openvino if installed)")
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads of the engine (all)")
    parser.add_argument("--seed", type=int, default=0, help="every random draw of the search follows from it (0)")
    parser.add_argument("--data", type=Path, metavar="DATA", help="training data of the recipes, as `data` in a recipe")
    parser.add_argument(
        "--train-steps",
        type=int,
        metavar="N",
        help="optimizer steps of a training stage at its full budget (200, or what --time has room for)",
    )
    parser.add_argument(
        "--select-features",
        type=Path,
        metavar="NET",
        help="image encoder, ONNX, that trials are selected by (default: a built-in one for 28 x 28 grey images)",
    )
    parser.add_argument(
        "--select-reference", type=Path, metavar="DATA", help="real images for it (default: samples of the teacher)"
    )
    parser.add_argument(
        "--features",
        type=Path,
        metavar="NET",
        help="image encoder, ONNX, that the front is rescored with (default: the built-in one of `evaluate`)",
    )
    parser.add_argument(
        "--reference", type=Path, metavar="DATA", help="real images for it (default: samples of the teacher)"
    )
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="prompts of a text model: half of them select, the others report",
    )
    parser.add_argument("--samples", type=int, default=256, help="images of each draw that is scored (256)")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of the search; it resumes there")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the front as JSON, as in DIR/front.json")


def run(args: argparse.Namespace) -> int:
    """Run the search; the same command again resumes it."""
    from diffpress.compress.search.settings import DEFAULT_TRIALS, make_settings, parse_duration

    seconds = None if args.time is None else parse_duration(args.time)
    if args.trials is not None and args.trials < 1:
        raise InvalidInputError(f"--trials {args.trials}: give at least 1")
    trials = args.trials if args.trials is not None or seconds is not None else DEFAULT_TRIALS
    given = _settings(args)
    # a mistake is reported before torch is imported
    make_settings(**given, train_steps=1 if args.train_steps is None else args.train_steps)
    import optuna  # noqa: F401 - a missing extra is reported before the model is loaded

    from diffpress.export.search.run import recorded_training_steps, search, training_steps
    from diffpress.runtime.io.files import write_json

    checkpoint = loaded(args)
    steps = args.train_steps or recorded_training_steps(args.out) or training_steps(checkpoint, seconds)
    settings = make_settings(**given, train_steps=steps)
    front = search(checkpoint, settings, args.out, trials=trials, seconds=seconds, show=print)
    if args.json:
        write_json(args.json, front)
    return 0


def preferred_engine(named: str | None) -> str:
    """Return the engine that was named, else the first of ENGINES that can run here."""
    from diffpress.runtime.engines import available

    return named or next((name for name in ENGINES if name in available()), ENGINES[-1])


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ["max_latency_ratio", "max_frechet_ratio", "max_size_mib", "seed", "threads", "data", "samples", "prompts"]
    names += ("select_features", "select_reference", "features", "reference")
    found = {name: getattr(args, name) for name in names} | {"engine": preferred_engine(args.engine)}
    for name in ("data", "prompts", "select_features", "select_reference", "features", "reference"):
        if found[name] is not None and not found[name].exists():
            raise InvalidInputError(f"--{name.replace('_', '-')} {found[name]}: does not exist")
    if found["data"] is None and args.checkpoint == str(TEACHER):
        found["data"] = SELECTION_REFERENCE
    return found
