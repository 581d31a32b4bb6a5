"""Arguments that several verbs share, and what they become."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress.compress.builtin import RECIPES, TEACHER
from diffpress.runtime.engines.cache import Cache
from diffpress.runtime.engines.onnxruntime.providers import PROVIDERS
from diffpress.runtime.engines.options import PRECISIONS, EngineOptions
from diffpress.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint

DEFAULT_RECIPE = RECIPES / "quick.yaml"


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """How the positional CHECKPOINT is to be read."""
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help="fuse a LoRA into it; may be repeated"
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="pipeline folder or hub id that says how a single .safetensors file is built"
    )


def loaded(args: argparse.Namespace, **options: Any) -> Checkpoint:
    """The checkpoint that the arguments name."""
    from diffpress.compress.sources.load import load_checkpoint

    return load_checkpoint(args.checkpoint, loras=args.lora, config=args.config, **options)


def recipe_path(text: str) -> Path:
    """A recipe's file; a bare name that is no file here means a built-in recipe."""
    built_in = RECIPES / f"{text}.yaml"
    return built_in if not Path(text).exists() and built_in.is_file() else Path(text)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=str(TEACHER),
        metavar="CHECKPOINT",
        help="folder, hub id, .safetensors or file.py:weights (default: the built-in teacher)",
    )
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--recipe",
        type=recipe_path,
        default=DEFAULT_RECIPE,
        metavar="R",
        help=f"a YAML file, or the name of a built-in one: {', '.join(sorted(p.stem for p in RECIPES.glob('*.yaml')))}",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override one setting of the recipe, like distill.steps=100",
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


def parsed_size(text: str) -> tuple[int, int]:
    """'512x768' -> (512, 768), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InvalidInputError(f"--size {text}: give height and width in pixels, as in 512x768")
    return int(match[1]), int(match[2])
