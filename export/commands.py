"""`diffpress export`: a checkpoint in, a bundle out, and what is in it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from compress.commands import add_checkpoint_arguments, loaded
from compress.context import say
from export.bake_time import fix_plan
from export.bundle import TARGETS, check_precision, check_targets, proven_engines, refuse_foreign, write_bundle
from export.half import FLOAT, PRECISIONS
from export.latency import float_variants, measure_latency
from export.prove import proof_line
from export.qdq import insert_qdq
from export.tensorrt_plan import add_tensorrt_arguments, build_options, plan_line
from export.to_onnx import to_onnx
from runtime.bundle import Bundle
from runtime.commands import parsed_size
from runtime.pipeline import resized

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffpress export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, hub id, .safetensors or file.py:weights")
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write the bundle to")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=["onnx"], help="engines to build or prove it for (onnx)"
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="how weights are held while exporting (fp32)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=FLOAT,
        help="what the graphs store and compute in; norms, softmax and decoders stay fp32 (fp32)",
    )
    parser.add_argument("--size", metavar="HxW", help="fix height and width of the image, in pixels")
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads of the parity check (all)")
    parser.add_argument(
        "--fixed-plan", action="store_true", help="for the plan's own timesteps alone: time embeddings become constants"
    )
    parser.add_argument(
        "--revert-slower", action="store_true", help="engines that int8 slows down on this machine take the float graph"
    )
    add_tensorrt_arguments(parser)


def export_command(args: argparse.Namespace) -> int:
    """Export and say what was written; raises DiffpressError for bad input and for a parity gate that fails."""
    refuse_foreign(args.out)  # before the checkpoint is read, which may take minutes
    checkpoint = loaded(args, DTYPES[args.dtype])
    if args.size is not None:
        checkpoint = checkpoint.evolve(spec=resized(checkpoint.spec, parsed_size(args.size)))
    fixed_size, graph, variants = args.size is not None, None, []
    build = build_options(args)
    check_targets(args.targets, args.compute_capability, build)
    check_precision(args.precision, checkpoint.quantization is not None, args.targets)
    if args.fixed_plan:
        checkpoint, graph = fix_plan(checkpoint, to_onnx(checkpoint, fixed_size))
    if checkpoint.quantization is not None:
        graph = graph or to_onnx(checkpoint, fixed_size)
        rounded = insert_qdq(graph, checkpoint.quantization)
        engines = dict.fromkeys(proven_engines(True, args.targets), rounded)
        latencies = measure_latency(checkpoint, graph, engines, args.threads, fixed_size)
        for latency in latencies:
            say(str(latency))
        variants = float_variants(graph, latencies) if args.revert_slower else []
    bundle = write_bundle(
        checkpoint,
        args.out,
        args.targets,
        float_graph=graph,
        variants=variants,
        capabilities=args.compute_capability,
        threads=args.threads,
        fixed_size=fixed_size,
        precision=args.precision,
        build=build,
    )
    for line in summary(bundle):
        print(line)
    return 0


def summary(bundle: Bundle) -> list[str]:
    """A bundle in a few lines: its files with sizes, what is quantized, its engines, its parity."""
    manifest = bundle.manifest
    denoiser = manifest["graphs"]["denoiser"]
    lines = [f"{bundle.path}: {manifest['name']}, {denoiser['parameters']:,} parameters, {denoiser['precision']}"]
    lines += [f"  {name}  {entry['bytes'] / 2**20:.2f} MiB" for name, entry in manifest["files"].items()]
    if denoiser["formats"]:
        lines.append("  layers: " + ", ".join(f"{count} in {kind}" for kind, count in denoiser["formats"].items()))
    weights = ", ".join(f"{dtype} {size / 2**20:.2f} MiB" for dtype, size in denoiser["bytes_by_precision"].items())
    lines.append(f"  weights: {weights}")
    for entry in manifest["engines"]:
        lines.append("  " + (proof_line(entry) if "integer_mac_share" in entry else plan_line(entry)))
    for engine, row in manifest["parity"].items():
        size = f"{row['samples']} samples, {row['steps']} steps"
        lines.append(
            f"  parity {engine}: {size}, largest difference {row['max_abs']:g}, SQNR {row['sqnr_db']:.1f} dB"
        )
    for engine, entry in denoiser["variants"].items():
        proof = f": parity SQNR {entry['parity']['sqnr_db']:.1f} dB" if "parity" in entry else ""
        lines.append(f"  {engine} takes {entry['file']}, {entry['precision']}{proof}")
    for name, graph in manifest["graphs"].items():
        for engine, sqnr_db in graph.get("parity", {}).items():
            lines.append(f"  parity {engine}: {name}, SQNR {sqnr_db:.1f} dB")
    return lines
