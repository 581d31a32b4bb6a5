"""`diffpress export`: a checkpoint in, a bundle out, and what is in it."""

from __future__ import annotations

import argparse
from pathlib import Path

from compress.load import load_checkpoint
from export.bundle import TARGETS, refuse_foreign, write_bundle
from runtime.bundle import Bundle


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `diffpress export`."""
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder, hub id, or file.py:weights")
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write the bundle to")
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=["onnx"], help="engines to build or prove it for (onnx)"
    )
    parser.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="CC",
        help="GPUs to build TensorRT plans for, as 8.9 (needed for target tensorrt)",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads of the parity check (all)")


def export_command(args: argparse.Namespace) -> int:
    """Export and say what was written; raises DiffpressError for bad input and for a parity gate that fails."""
    refuse_foreign(args.out)  # before the checkpoint is read, which may take minutes
    checkpoint = load_checkpoint(args.checkpoint)
    bundle = write_bundle(
        checkpoint, args.out, args.targets, capabilities=args.compute_capability, threads=args.threads
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
    if denoiser["quantized_layers"] or denoiser["weight_only_layers"]:
        integer, stored = len(denoiser["quantized_layers"]), len(denoiser["weight_only_layers"])
        lines.append(f"  {integer} layers compute in {denoiser['precision']}, {stored} more store their weights in it")
    for entry in manifest["engines"]:
        lines.append("  " + ", ".join(f"{key} {value}" for key, value in entry.items() if key != "graph_sha256"))
    for engine, row in manifest["parity"].items():
        lines.append(f"  parity {engine}: largest difference {row['max_abs']:g}, SQNR {row['sqnr_db']:.1f} dB")
    return lines
