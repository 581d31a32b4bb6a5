"""`diffpress plan` and `diffpress evaluate`."""

from __future__ import annotations

import argparse
import json
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from compress.builtin import FEATURES, RECIPES, REFERENCE, TEACHER
from compress.checkpoint import Checkpoint
from compress.config import EvaluateConfig, QuantizeConfig
from compress.context import Context, say
from compress.counts import count
from compress.evaluate import evaluate, load_features, load_reference, paired
from compress.load import load_checkpoint
from compress.prune import prune
from compress.quantization.formats import FORMATS, stored_bytes
from compress.quantization.layers import choose_formats
from compress.quantization.quantizers import fake_quantized
from compress.recipe import Recipe, read_recipe
from compress.torch_network import TorchNetwork
from runtime.bundle import MANIFEST, load_bundle
from runtime.commands import asked_spec
from runtime.engines import open_engine
from runtime.engines.options import EngineOptions
from runtime.errors import BadInput
from runtime.files import write_json
from runtime.spec import DenoiserSpec

DEFAULT_RECIPE = RECIPES / "quick.yaml"


def add_checkpoint_arguments(parser: argparse.ArgumentParser) -> None:
    """How the positional CHECKPOINT is to be read."""
    parser.add_argument(
        "--lora", action="append", default=[], metavar="PATH[:SCALE]", help="fuse a LoRA into it; may be repeated"
    )
    parser.add_argument(
        "--config", metavar="FOLDER", help="pipeline folder or hub id that says how a single .safetensors file is built"
    )


def loaded(args: argparse.Namespace, dtype: torch.dtype = torch.float32) -> Checkpoint:
    """The checkpoint that the arguments name."""
    return load_checkpoint(args.checkpoint, loras=args.lora, config=args.config, dtype=dtype)


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


# --- plan ------------------------------------------------------------------------------------------------------


def add_plan_arguments(parser: argparse.ArgumentParser) -> None:
    add_recipe_arguments(parser)
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="as JSON, to FILE or to the screen")


def plan_command(args: argparse.Namespace) -> int:
    recipe = read_recipe(args.recipe, tuple(args.set))
    result = planned(loaded(args), recipe)
    if args.json == "-":
        print(json.dumps(result, indent=1))
        return 0
    if args.json:
        write_json(Path(args.json), result)
    print(f"recipe {args.recipe}, seed {recipe.seed}")
    for number, stage in enumerate(result["stages"]):
        settings = ", ".join(f"{k}={v}" for k, v in stage["config"].items())
        print(f"  {number + 1}. {stage['name']:<9} {settings}")
        print(f"     -> {_sizes_in_words(stage['after'])}")
    print(f"before: {_sizes_in_words(result['before'])}")
    return 0


def planned(checkpoint: Checkpoint, recipe: Recipe) -> dict[str, Any]:
    """The resolved recipe, the stage order, and sizes before and, where they can be known, after each stage."""
    before = _sizes(checkpoint)
    sizes: dict[str, int] | None = before
    stages: list[dict[str, Any]] = []
    for stage in recipe.stages:
        if stage.name == "prune" and stage.config.scope == "global":
            sizes = None  # what goes where depends on the importance, which is measured when it runs
        elif stage.name == "prune" and sizes:
            # the widths depend on the ratio alone: any criterion shows the sizes, and this one needs no data
            dry = stage.config.model_copy(update={"method": "magnitude"})
            checkpoint = prune(checkpoint, dry, Context(recipe.seed, Path(), checkpoint))
            sizes = _sizes(checkpoint)
        elif stage.name == "quantize" and sizes:
            sizes = {**sizes, "bytes": _quantized_bytes(checkpoint, stage.config)}
        stages.append({"name": stage.name, "config": stage.config.model_dump(mode="json"), "after": sizes})
    return {"recipe": recipe.to_json(), "order": [s.name for s in recipe.stages], "before": before, "stages": stages}


def _sizes(checkpoint: Checkpoint) -> dict[str, int]:
    counts = count(checkpoint.model, checkpoint.spec)
    return {"parameters": counts.parameters, "macs": counts.macs, "bytes": counts.fp32_bytes}


def _sizes_in_words(sizes: dict[str, int] | None) -> str:
    if sizes is None:
        return "sizes depend on the importance, measured when it runs"
    return f"{sizes['parameters']:,} parameters, {sizes['macs']:,} MACs, {sizes['bytes'] / 2**20:.2f} MiB of weights"


def _quantized_bytes(checkpoint: Checkpoint, config: QuantizeConfig) -> int:
    total = count(checkpoint.model, checkpoint.spec).fp32_bytes
    for name, kind in choose_formats(checkpoint.model, config).items():
        weight: torch.Tensor = checkpoint.model.get_submodule(name).weight  # type: ignore[assignment]
        total += stored_bytes(FORMATS[kind], weight.shape) - 4 * weight.numel()
    return total


# --- evaluate --------------------------------------------------------------------------------------------------


def add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
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


def evaluate_command(args: argparse.Namespace) -> int:
    for name in ("samples", "seeds", "batch"):
        if getattr(args, name) < (8 if name == "samples" else 1):
            raise BadInput(f"--{name} {getattr(args, name)}: too few (samples: at least 8, seeds and batch: 1)")
    network, spec = open_network(args.subject, args.engine, args.threads)
    with closing(network):
        spec = asked_spec(spec, args.steps)
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


def open_network(
    reference: str, engine: str | None, threads: int | None, options: EngineOptions | None = None
) -> tuple[Any, DenoiserSpec]:
    """A bundle in an engine, or a checkpoint in torch (fake-quantized where it was quantized)."""
    if (Path(reference) / MANIFEST).is_file():
        bundle = load_bundle(reference)
        opened = open_engine(bundle, engine, threads, options=options)
        return opened, bundle.spec_for(opened.name)
    checkpoint = load_checkpoint(reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchNetwork(fake_quantized(checkpoint).to(device), checkpoint.spec), checkpoint.spec


def print_evaluation(name: str, result: dict[str, Any]) -> None:
    frechet, kid = result["frechet"], result["kid"]
    say(
        f"{name}: Frechet {frechet['mean']:.3f} ± {frechet['sd']:.3f} (real images {frechet['floor']:.3f}), "
        f"KID {kid['mean']:.4f} ± {kid['sd']:.4f}, {result['seeds']} x {result['samples']} samples, "
        f"features {result['features']['name']}"
    )
    if result["label_accuracy"] is not None:
        say(f"{name}: {result['label_accuracy']:.1%} of the labels recognised")
    if result["paired"]:
        say(
            f"{name}: PSNR {result['paired']['psnr_db']:.1f} dB, SSIM {result['paired']['ssim']:.3f} "
            f"against {result['paired']['against']}, same noise"
        )
