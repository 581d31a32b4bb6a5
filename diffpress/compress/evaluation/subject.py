"""Open the subject of an evaluation (a bundle in an engine, or a checkpoint in torch) and print its scores."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from diffpress.compress.models.torch_network import TorchNetwork
from diffpress.compress.quantization.quantizers import fake_quantized
from diffpress.compress.sources.load import load_checkpoint
from diffpress.runtime.bundle import MANIFEST, load_bundle
from diffpress.runtime.engines import open_engine
from diffpress.runtime.engines.options import EngineOptions
from diffpress.runtime.spec import DenoiserSpec

logger = logging.getLogger(__name__)


def open_network(
    reference: str, engine: str | None, threads: int | None, options: EngineOptions | None = None
) -> tuple[Any, DenoiserSpec]:
    """Open a bundle in an engine, or a checkpoint in torch (fake-quantized if quantized); return it with its spec."""
    if (Path(reference) / MANIFEST).is_file():
        bundle = load_bundle(reference)
        opened = open_engine(bundle, engine, threads, options=options)
        return opened, bundle.spec_for(opened.name)
    checkpoint = load_checkpoint(reference)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return TorchNetwork(fake_quantized(checkpoint).to(device), checkpoint.spec), checkpoint.spec


def log_evaluation(name: str, result: dict[str, Any]) -> None:
    """Log the result of `evaluate` in up to three lines."""
    frechet, kid = result["frechet"], result["kid"]
    logger.info(
        f"{name}: Frechet {frechet['mean']:.3f} ± {frechet['sd']:.3f} (real images {frechet['floor']:.3f}), "
        f"KID {kid['mean']:.4f} ± {kid['sd']:.4f}, {result['seeds']} x {result['samples']} samples, "
        f"features {result['features']['name']}"
    )
    if result["label_accuracy"] is not None:
        logger.info(f"{name}: label accuracy {result['label_accuracy']:.1%}")
    if result["paired"]:
        logger.info(
            f"{name}: PSNR {result['paired']['psnr_db']:.1f} dB, SSIM {result['paired']['ssim']:.3f} "
            f"against {result['paired']['against']}, same noise"
        )
