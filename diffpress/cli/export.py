"""`diffpress export`: export a checkpoint to a bundle and print its summary."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

from diffpress.cli.arguments import add_checkpoint_arguments, loaded, parsed_size
from diffpress.runtime.engines.tensorrt.options import HARDWARE, SWITCHES, BuildOptions
from diffpress.runtime.errors import InvalidInputError

TARGETS = ("onnx", "openvino", "tensorrt", "sampler", "triton", "web", "genai")
PRECISIONS = ("fp32", "fp16", "bf16")
LORA_LAYERS = ("linear", "all")
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of torch
DEFAULTS = BuildOptions()
EXAMPLE = "diffpress export work/checkpoint --out bundle --targets onnx openvino"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `diffpress export`."""
    add_checkpoint_arguments(parser)
    parser.add_argument("--out", type=Path, required=True, metavar="BUNDLE", help="folder to write the bundle to")
    parser.add_argument(
        "--targets",
        nargs="+",
        choices=TARGETS,
        default=["onnx"],
        help="engines to build or check the bundle for, and a sampler in one file: sampler, triton, web (onnx)",
    )
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="fp32", help="how weights are held while exporting (fp32)"
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="what the graphs store and compute in; norms, softmax and decoders stay fp32 (fp32)",
    )
    parser.add_argument("--size", metavar="HxW", help="fix height and width of the image, in pixels")
    parser.add_argument(
        "--decoder",
        type=Path,
        metavar="FOLDER",
        help="autoencoder in place of the pipeline's, such as a tiny one (TAESD)",
    )
    parser.add_argument(
        "--image-inputs",
        action="store_true",
        help="export the encoder of the autoencoder, so that the bundle can start from images",
    )
    parser.add_argument(
        "--web-runtime",
        metavar="FOLDER",
        help="target web: the npm package onnxruntime-web (default: that in node_modules)",
    )
    parser.add_argument(
        "--nearest-plan",
        action="store_true",
        help="for target genai: the nearest plan that OpenVINO GenAI can follow, if it cannot follow the model's own",
    )
    parser.add_argument(
        "--controlnet",
        action="append",
        default=[],
        metavar="FOLDER",
        help="ControlNet to export with the U-Net, a folder or hub id; repeat it for several, in the order of their "
        "images",
    )
    parser.add_argument(
        "--lora-slots",
        type=int,
        default=0,
        metavar="N",
        help="LoRAs that can be set in the bundle at the same time (0)",
    )
    parser.add_argument(
        "--lora-rank", type=int, default=32, metavar="R", help="largest rank of a LoRA that a slot takes (32)"
    )
    parser.add_argument(
        "--lora-layers",
        choices=LORA_LAYERS,
        default="linear",
        help="layers with slots: linear layers and convolutions of 1 x 1, or larger convolutions as well (linear)",
    )
    parser.add_argument("--threads", type=int, metavar="T", help="processor threads of the parity check (all)")
    parser.add_argument(
        "--parity-sqnr-db",
        type=float,
        metavar="X",
        help="SQNR to torch in dB that the denoiser's graphs must reach, in place of the built-in bounds",
    )
    parser.add_argument(
        "--fixed-timesteps",
        action="store_true",
        help="fold the timestep embedding for the plan's own timesteps into constants",
    )
    # its name in diffpress 0.1
    parser.add_argument("--fixed-plan", dest="fixed_timesteps", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument(
        "--revert-slower", action="store_true", help="give the float graph to engines that int8 slows down here"
    )
    add_tensorrt_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Export and print a summary; raises DiffpressError for invalid input or a failed parity gate."""
    import torch

    from diffpress.api import export
    from diffpress.export.bundle import check_output_folder
    from diffpress.export.summary import summary

    check_output_folder(args.out)  # before the checkpoint is read, which may take minutes
    build = build_options(args)
    bundle = export(
        loaded(args, dtype=getattr(torch, DTYPES[args.dtype])),
        args.out,
        targets=args.targets,
        precision=args.precision,
        size=None if args.size is None else parsed_size(args.size),
        fixed_timesteps=args.fixed_timesteps,
        image_inputs=args.image_inputs,
        controlnet=args.controlnet,
        decoder=args.decoder,
        nearest_plan=args.nearest_plan,
        lora_slots=args.lora_slots,
        lora_rank=args.lora_rank,
        lora_layers=args.lora_layers,
        revert_slower=args.revert_slower,
        compute_capabilities=args.compute_capability,
        build=build,
        web_runtime=args.web_runtime,
        threads=args.threads,
        parity_sqnr_db=args.parity_sqnr_db,
    )
    for line in summary(bundle):
        print(line)
    return 0


def add_tensorrt_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that control TensorRT engine builds; defaults are those of BuildOptions."""
    group = parser.add_argument_group("target tensorrt")
    group.add_argument(
        "--compute-capability",
        nargs="+",
        default=[],
        metavar="CC",
        help="compute capabilities of the GPUs to build for, e.g. 8.9 (default: the GPU of this machine)",
    )
    group.add_argument(
        "--batch",
        nargs=3,
        type=int,
        default=DEFAULTS.batch,
        metavar=("MIN", "OPT", "MAX"),
        help=f"smallest, usual and largest batch size of the engine ({' '.join(map(str, DEFAULTS.batch))})",
    )
    group.add_argument(
        "--sizes", nargs=2, metavar="HxW", help="smallest and largest image in pixels (default: only the model's size)"
    )
    group.add_argument(
        "--optimization-level",
        type=int,
        default=DEFAULTS.optimization_level,
        metavar="L",
        help="builder optimization level, 0 to 5 (3)",
    )
    group.add_argument(
        "--workspace-mib", type=int, metavar="M", help="GPU memory in MiB for the workspace of kernels (default: all)"
    )
    group.add_argument(
        "--hardware-compatible",
        choices=HARDWARE,
        default=DEFAULTS.hardware_compatible,
        help="other GPUs the engine also runs on (tensorrt only, not tensorrt-rtx)",
    )
    for name, what in SWITCHES.items():
        group.add_argument(f"--{name.replace('_', '-')}", action="store_true", help=what)


def build_options(args: argparse.Namespace) -> BuildOptions:
    """Return the BuildOptions of the parsed arguments; raises InvalidInputError for invalid values."""
    return BuildOptions(
        batch=tuple(args.batch),
        sizes=None if args.sizes is None else (_size(args.sizes[0]), _size(args.sizes[1])),
        optimization_level=args.optimization_level,
        workspace_mib=args.workspace_mib,
        hardware_compatible=args.hardware_compatible,
        **{name: getattr(args, name) for name in SWITCHES},
    )


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)x(\d+)", text)
    if match is None:
        raise InvalidInputError(f"--sizes {text}: give height and width in pixels, as in 512x768")
    return int(match[1]), int(match[2])
