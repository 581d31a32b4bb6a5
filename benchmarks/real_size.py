"""Memory and time at full model size: U-Nets of Stable Diffusion 1.5 (860M) and SDXL (2.6B), random weights.

    python benchmarks/real_size.py sd15     load, int8 PTQ of weights and activations (8 steps), export
    python benchmarks/real_size.py sdxl     load in bf16, export

Random weights need no download, and memory and time do not depend on weight values. One process writes the weights and
a second one reads them. The reported figure is the second one's peak resident memory (VmHWM, which includes mapped
files). Prints one row of the table in benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SDXL: dict[str, Any] = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "use_linear_projection": True,
}
MODELS = {"sd15": (SD15, "float32"), "sdxl": (SDXL, "bfloat16")}
PTQ_STEPS = 8


def write_unet(name: str, folder: Path) -> None:
    """Write the model's config and variance-preserving random weights, in the dtype it is usually stored in."""
    import torch
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel
    from safetensors.torch import save_file

    config, dtype = MODELS[name]
    with init_empty_weights():
        model = UNet2DConditionModel(**config)
    generator, state = torch.Generator().manual_seed(0), {}
    for key, tensor in model.state_dict().items():
        if tensor.dim() > 1:
            weight = torch.randn(tensor.shape, generator=generator).div_(tensor[0].numel() ** 0.5)
        else:
            weight = torch.ones(tensor.shape) if key.endswith("weight") else torch.zeros(tensor.shape)
        state[key] = weight.to(getattr(torch, dtype))
    (folder / "unet").mkdir(parents=True)
    text = json.dumps(dict(model.config) | {"_class_name": "UNet2DConditionModel"})
    (folder / "unet" / "config.json").write_text(text)
    save_file(state, folder / "unet" / "diffusion_pytorch_model.safetensors")


def compress(name: str, folder: Path, out: Path) -> None:
    """Load, quantize (sd15) and export the model; print the seconds and the peak memory so far after each step."""
    import torch

    from diffpress.compress.context import Context
    from diffpress.compress.quantization.config import QuantizeConfig
    from diffpress.compress.quantization.quantize import quantize
    from diffpress.compress.sources.load import load_checkpoint
    from diffpress.export.bundle import export_bundle
    from diffpress.runtime.sampling_plan import make_plan

    checkpoint = timed("load", lambda: load_checkpoint(folder, dtype=getattr(torch, MODELS[name][1])))
    if name == "sd15":
        plan = make_plan("dpmpp_2m", PTQ_STEPS, checkpoint.spec.schedule, guidance=7.5, clip=False)
        checkpoint = checkpoint.evolve(spec=checkpoint.spec.with_plan(plan))
        context = Context(0, out / "work", checkpoint)
        config = QuantizeConfig(samples=1, batch=1)
        checkpoint = timed("int8 PTQ", lambda loaded=checkpoint: quantize(loaded, config, context))
    bundle = timed("export", lambda: export_bundle(checkpoint, out / "bundle"))
    print(json.dumps({"parity": bundle.manifest["parity"]}))


def timed(what: str, work: Callable[[], Any]) -> Any:
    from diffpress.runtime.benchmarking.probe import peak_mib

    start = time.perf_counter()
    result = work()
    seconds = round(time.perf_counter() - start, 1)
    print(json.dumps({"step": what, "seconds": seconds, "peak_mib": peak_mib()}), flush=True)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument(
        "--work", type=Path, help="folder for weights and bundle, needs 20 GB (default: a temporary one)"
    )
    parser.add_argument("--part", choices=("write", "compress"), help=argparse.SUPPRESS)  # which of the two processes
    args = parser.parse_args()
    if args.part == "write":
        write_unet(args.model, args.work / args.model)
    elif args.part == "compress":
        compress(args.model, args.work / args.model, args.work / f"{args.model}-out")
    else:
        with tempfile.TemporaryDirectory() as temporary:
            work = args.work or Path(temporary)
            for process in ("write", "compress"):
                if process == "compress" or not (work / args.model).is_dir():
                    command = [sys.executable, __file__, args.model, "--work", str(work), "--part", process]
                    subprocess.run(command, check=True)
            weights = work / args.model / "unet" / "diffusion_pytorch_model.safetensors"
            print(json.dumps({"weights_mib": round(weights.stat().st_size / 2**20)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
