"""Arguments that several verbs share, and the objects that they are turned into."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffpress.compress.builtin import TEACHER, built_in_recipes, recipe_file
from diffpress.runtime.engines.cache import Cache, cache_folder
from diffpress.runtime.engines.onnxruntime.providers import PROVIDERS
from diffpress.runtime.engines.options import PRECISIONS, EngineOptions
from diffpress.runtime.errors import InvalidInputError

if TYPE_CHECKING:
    from diffpress.compress.checkpoint import Checkpoint

DEFAULT_RECIPE = built_in_recipes()["quick"]


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT and the options that say how it is read."""
    parser.add_argument(
        "checkpoint",
        nargs="?",
        default=str(TEACHER),
        metavar="CHECKPOINT",
        help="folder, hub id, .safetensors or file.py:weights (default: the built-in teacher)",
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help="fuse a LoRA first; may be repeated"
    )
    parser.add_argument(
        "--config",
        metavar="FOLDER",
        help="pipeline folder or hub id that describes how a single .safetensors file is built",
    )


def loaded(args: argparse.Namespace, **options: Any) -> Checkpoint:
    """Load the checkpoint that the arguments name."""
    from diffpress.compress.sources.load import load_checkpoint

    return load_checkpoint(args.checkpoint, loras=args.lora, config=args.config, **options)


def add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    """Add CHECKPOINT, its options, and the recipe with its overrides."""
    add_checkpoint_arguments(parser)
    parser.add_argument(
        "--recipe",
        type=recipe_file,
        default=DEFAULT_RECIPE,
        metavar="R",
        help=f"a YAML file or the name of a built-in recipe: {', '.join(built_in_recipes())} (quick)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="key=value",
        help="override one setting of the recipe, like distill.steps=100",
    )


def add_engine_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that become EngineOptions; an engine refuses options that it does not support."""
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads (all)")
    parser.add_argument("--streams", type=int, default=1, metavar="S", help="batches that run at the same time (1)")
    parser.add_argument(
        "--precision",
        default="fp32",
        metavar="P",
        help=f"precision of float layers, where the engine supports it: {', '.join(PRECISIONS)} (fp32)",
    )
    parser.add_argument(
        "--providers",
        nargs="+",
        default=[],
        metavar="P",
        help=f"onnxruntime execution providers in order: {', '.join(PROVIDERS)}",
    )
    parser.add_argument(
        "--rebuild", action="store_true", help="tensorrt: build an engine for this GPU if the bundle has none"
    )


def engine_options(args: argparse.Namespace, cache: Cache | None) -> EngineOptions:
    """Return the engine's options; raises InvalidInputError for values that make no sense."""
    return EngineOptions(
        threads=args.threads,
        streams=args.streams,
        precision=args.precision,
        providers=tuple(args.providers),
        rebuild=args.rebuild,
        cache=cache,
    )


def chosen_engine(args: argparse.Namespace) -> str | None:
    """Return the engine that was named; None for the first one that can run here. --rebuild implies tensorrt."""
    return args.engine or ("tensorrt" if args.rebuild else None)


def utf8_text(text: str) -> str:
    """Return an argument as text: under an ASCII locale Python keeps the bytes of other characters as surrogates."""
    try:
        return text.encode("utf-8", "surrogateescape").decode("utf-8")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8") from error


def parsed_size(text: str) -> tuple[int, int]:
    """Parse '512x768' as (512, 768), height first."""
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InvalidInputError(f"--size {text}: give height and width in pixels, as in 512x768")
    return int(match[1]), int(match[2])


def add_signature_argument(parser: argparse.ArgumentParser) -> None:
    """Add --require-signature, for the verbs that open bundles."""
    parser.add_argument(
        "--require-signature",
        dest="public_key",
        type=Path,
        metavar="PUBKEY",
        help="open only bundles signed with this key, a PEM file (see 'diffpress sign')",
    )


def add_cache_argument(parser: argparse.ArgumentParser) -> None:
    """Add --no-cache."""
    parser.add_argument(
        "--no-cache",
        action="store_true",
        help=f"do not cache compiled graphs (default: in {cache_folder()}, or in DIFFPRESS_CACHE)",
    )


def compiled_cache(args: argparse.Namespace) -> Cache | None:
    """Return where compiled graphs are cached; None with --no-cache."""
    return None if args.no_cache else Cache(cache_folder())
