"""Parity: one whole trajectory through torch and through every engine, on the same noise, labels and plan.

    max_abs   max |engine - torch|  over the final images
    sqnr_db   10 log10(sum torch^2 / sum (engine - torch)^2)  of each final image, the mean over images

against the float torch model in both cases. A float graph must stay within MAX_ABS of it. A quantized graph is held to
what torch's own fake quantization loses: its SQNR may be at most WITHIN_DB lower. One forward would not do: rounding
that a single step hides is fed back into the next.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np

from compress.checkpoint import Checkpoint
from compress.metrics import mean_sqnr_db
from compress.quantize import fake_quantized
from compress.torch_network import TorchNetwork
from runtime.denoise import Network
from runtime.engines import available, load_engine
from runtime.errors import GateFailed
from runtime.sampler import generate
from runtime.spec import DenoiserSpec

SAMPLES = 16  # the SQNR of four strays by a decibel from draw to draw
MAX_ABS = 1e-3
WITHIN_DB = 1.0

FAKE_QUANT = "torch_fake_quant"

Parity = dict[str, dict[str, float]]


def check_parity(
    checkpoint: Checkpoint,
    graph: Path,
    *,
    engines: list[str] | None = None,
    samples: int = SAMPLES,
    threads: int | None = None,
) -> Parity:
    """{engine: {max_abs, sqnr_db}} of `graph`, the checkpoint's, against its float torch model.

    `engines` None takes all that are installed. A quantized checkpoint adds the row 'torch_fake_quant'. Raises
    GateFailed where an engine strays further than the bounds above.
    """
    measured = measure_parity(checkpoint, graph, engines=engines, samples=samples, threads=threads)
    for name, row in measured.items():
        if FAKE_QUANT not in measured and not row["max_abs"] <= MAX_ABS:
            raise GateFailed(
                f"{graph.name} in {name}: images differ from torch's by {row['max_abs']:.2g} at most "
                f"({row['sqnr_db']:.1f} dB), {MAX_ABS:g} is allowed"
            )
        if FAKE_QUANT in measured and not row["sqnr_db"] >= measured[FAKE_QUANT]["sqnr_db"] - WITHIN_DB:
            raise GateFailed(
                f"{graph.name} in {name}: {row['sqnr_db']:.1f} dB SQNR to the float model (largest difference "
                f"{row['max_abs']:.2g}), torch's fake quantization has {measured[FAKE_QUANT]['sqnr_db']:.1f} dB and "
                f"{WITHIN_DB:g} dB less is allowed"
            )
    return measured


def measure_parity(
    checkpoint: Checkpoint,
    graph: Path,
    *,
    engines: list[str] | None = None,
    samples: int = SAMPLES,
    threads: int | None = None,
) -> Parity:
    """As `check_parity`, without bounds. Figures are rounded, so that they repeat."""
    spec = checkpoint.spec
    reference = _images(TorchNetwork(checkpoint.model, spec), spec, samples)
    found = {}
    if checkpoint.quantization is not None:
        found[FAKE_QUANT] = _images(TorchNetwork(fake_quantized(checkpoint), spec), spec, samples)
    for name in available() if engines is None else engines:
        with closing(load_engine(graph, name, threads)) as engine:
            found[name] = _images(engine, spec, samples)
    return {name: _compared(reference, images) for name, images in found.items()}


def _images(network: Network, spec: DenoiserSpec, samples: int) -> np.ndarray:
    return generate(network, spec, seeds=range(samples), batch=samples)


def _compared(reference: np.ndarray, images: np.ndarray) -> dict[str, float]:
    largest = float(np.abs(images - reference).max())
    return {"max_abs": float(f"{largest:.1e}"), "sqnr_db": round(mean_sqnr_db(reference, images), 1)}
