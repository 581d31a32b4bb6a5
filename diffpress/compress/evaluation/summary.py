"""Scores as text. Imports no torch: `diffpress report` only reads what was measured."""

from __future__ import annotations

import logging
from typing import Any

logger = logging.getLogger(__name__)


def log_evaluation(name: str, result: dict[str, Any]) -> None:
    """Log the result of `evaluate` in up to four lines."""
    frechet, kid = result["frechet"], result["kid"]
    if frechet is not None:
        logger.info(
            f"{name}: Frechet {spread(frechet)} (real images {frechet['floor']:.3f}), KID {spread(kid, 4)}, "
            f"{result['seeds']} x {result['samples']} samples, features {result['features']['name']}"
        )
    if result["label_accuracy"] is not None:
        logger.info(f"{name}: label accuracy {result['label_accuracy']:.1%}")
    if "clip_score" in result:
        among = f"{result['retrieval']['candidates']} texts"
        accuracy = f"retrieval accuracy among {among} {spread(result['retrieval'])}"
        logger.info(f"{name}: CLIP score {spread(result['clip_score'], 2)}, {accuracy}")
    if result["paired"]:
        logger.info(
            f"{name}: PSNR {result['paired']['psnr_db']:.1f} dB, SSIM {result['paired']['ssim']:.3f} "
            f"against {result['paired']['against']}, same noise"
        )


def spread(value: dict[str, Any], digits: int = 3) -> str:
    """Format mean and standard deviation; a single seed has none."""
    mean = f"{value['mean']:.{digits}f}"
    return f"{mean} (one seed)" if value["sd"] is None else f"{mean} ± {value['sd']:.{digits}f}"
