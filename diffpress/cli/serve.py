"""`diffpress serve`: answer requests for images over HTTP, without torch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from diffpress.cli.arguments import (
    add_cache_argument,
    add_engine_arguments,
    add_signature_argument,
    chosen_engine,
    compiled_cache,
    engine_options,
)
from diffpress.runtime.engines import ENGINES
from diffpress.runtime.errors import InvalidInputError
from diffpress.serve.settings import API_KEY_VARIABLE, Access, Batching, Limits, access_for

EXAMPLE = "diffpress serve build/demo --port 8000"
LIMITS, BATCHING = Limits(), Batching()
DRAIN_SECONDS = 30.0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress serve`."""
    parser.add_argument(
        "bundles",
        nargs="+",
        metavar="BUNDLE",
        help="folder of a bundle or of a compress run, as PATH, NAME=PATH or NAME=PATH@ENGINE; NAME is `model` in "
        "requests (default: the folder's name), and the first bundle is also 'default'",
    )
    parser.add_argument("--host", default="127.0.0.1", metavar="H", help="address to listen on (127.0.0.1)")
    parser.add_argument("--port", type=int, default=8000, metavar="P", help="port; 0 takes a free one (8000)")
    parser.add_argument(
        "--api-key-file",
        type=Path,
        metavar="FILE",
        help=f"file with the key that requests must have (default: the environment's {API_KEY_VARIABLE}); addresses "
        "that other machines can reach need one",
    )
    parser.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="accept this Host header besides the address and localhost; '*' accepts any; may be repeated",
    )
    parser.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="let pages of this origin read responses (CORS), like https://example.org; may be repeated",
    )
    batching = parser.add_argument_group("batching")
    batching.add_argument(
        "--max-batch",
        type=int,
        default=BATCHING.images,
        metavar="B",
        help=f"images sampled together ({BATCHING.images})",
    )
    batching.add_argument(
        "--max-wait-ms",
        type=float,
        default=BATCHING.wait_ms,
        metavar="MS",
        help=f"how long an image waits for others of its plan and size ({BATCHING.wait_ms:g})",
    )
    batching.add_argument(
        "--max-queue",
        type=int,
        default=BATCHING.queue,
        metavar="N",
        help=f"images that wait for each bundle; further requests get status 429 ({BATCHING.queue})",
    )
    batching.add_argument(
        "--memory-budget-mib",
        type=float,
        metavar="MIB",
        help="size of the graphs of all open bundles together; others are closed first (no limit)",
    )
    limits = parser.add_argument_group("limits of a request")
    for flag, name, kind, what in (
        ("--max-images", "images", int, "images"),
        ("--max-steps", "steps", int, "denoising steps"),
        ("--max-side", "side", int, "height and width in pixels"),
        ("--max-prompt", "prompt", int, "characters of a prompt"),
        ("--max-body", "body", int, "bytes of the body"),
        ("--max-seconds", "seconds", float, "seconds until its last image"),
    ):
        default = getattr(LIMITS, name)
        limits.add_argument(flag, type=kind, default=default, metavar="N", help=f"{what} ({default:g})")
    parser.add_argument(
        "--drain-seconds",
        type=float,
        default=DRAIN_SECONDS,
        metavar="S",
        help=f"how long requests in progress may take after SIGTERM ({DRAIN_SECONDS:g})",
    )
    parser.add_argument("--log-prompts", action="store_true", help="log prompts; they are not logged otherwise")
    parser.add_argument("--engine", metavar="E", help=f"{', '.join(ENGINES)} (the first of these that can run here)")
    add_engine_arguments(parser)
    add_signature_argument(parser)
    add_cache_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or SIGINT; raises DiffpressError."""
    from diffpress.serve.models import Model, parsed_source
    from diffpress.serve.server import Address, serve
    from diffpress.serve.service import Service, Settings
    from diffpress.serve.web.logs import json_logs

    settings = Settings(
        limits=Limits(args.max_images, args.max_steps, args.max_side, args.max_prompt, args.max_body, args.max_seconds),
        batching=Batching(args.max_batch, args.max_wait_ms, args.max_queue),
        access=_access(args),
        budget_bytes=_budget_bytes(args.memory_budget_mib),
        log_prompts=args.log_prompts,
    )
    if not args.drain_seconds >= 0:
        raise InvalidInputError(f"--drain-seconds {args.drain_seconds}: must not be negative")
    sources = [parsed_source(text) for text in args.bundles]
    options = engine_options(args, compiled_cache(args))
    engine = chosen_engine(args)
    models = [
        Model(source._replace(engine=source.engine or engine), options, args.max_batch, args.public_key)
        for source in sources
    ]
    with json_logs(args.log_prompts):
        serve(Service(models, settings), Address(args.host, args.port), args.drain_seconds)
    return 0


def _access(args: argparse.Namespace) -> Access:
    return access_for(args.host, tuple(args.allow_host), tuple(args.allow_origin), args.api_key_file)


def _budget_bytes(mib: float | None) -> int | None:
    if mib is not None and not 0 < mib < math.inf:
        raise InvalidInputError(f"--memory-budget-mib {mib:g}: must be a number above 0")
    return None if mib is None else int(mib * 2**20)
